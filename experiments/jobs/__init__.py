"""Jobs: what they train and measure goes to a work directory as data."""

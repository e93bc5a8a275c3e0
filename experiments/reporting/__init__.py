"""Tables, figures and exports, from what jobs wrote."""

"""Tables, figures and pages, made from records and tidy tables; imports no torch."""

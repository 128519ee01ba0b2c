"""Tables, figures and pages, made from records and tidy tables; never imports torch."""

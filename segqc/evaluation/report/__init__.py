"""From numbers to a report: tables, figures, example slices, and what not to conclude from them."""

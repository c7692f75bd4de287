"""What corrections buy: learning curves of a simulated annotator who corrects what the product hands out."""

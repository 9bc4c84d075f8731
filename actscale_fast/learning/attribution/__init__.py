"""What each head contributes to an answer: predicted by one gradient, measured by knocking heads out."""

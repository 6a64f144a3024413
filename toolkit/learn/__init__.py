"""Small models, optimisers and generated data for chapters that train."""

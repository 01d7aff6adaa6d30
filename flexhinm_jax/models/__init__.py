"""Small models as pure functions over plain parameter trees."""

"""A runner's side: the walk through the schedule, its workers, and what they tell. It imports no torch."""

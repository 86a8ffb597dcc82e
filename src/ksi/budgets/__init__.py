"""Budgets: limits on the usage of agents, models, providers, sessions or all in an hour, a day, a week or a month."""

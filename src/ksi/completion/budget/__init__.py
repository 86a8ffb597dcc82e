"""Budgets at work: the caps of requests, the budgets that hold now, and the requests of operators."""

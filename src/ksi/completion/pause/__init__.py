"""Holding requests back: the operators' pauses, and the return of requests set aside."""

-- From layout 10 to 11: claims and ends write what they change in budgets into a journal.

CREATE TABLE budget_steps (
    id   INTEGER PRIMARY KEY,
    data BLOB NOT NULL
);

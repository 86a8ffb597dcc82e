-- From layout 8 to 9: budgets.

ALTER TABLE request ADD COLUMN budget TEXT; -- of one that waits for a budget: its name, and whom it counts for, on two lines
ALTER TABLE request ADD COLUMN budget_end INTEGER; -- the end of that budget's window
CREATE INDEX over_budget ON request (budget, rank, key) WHERE ready = 2 AND budget IS NOT NULL;
CREATE INDEX budget_ends ON request (budget_end) WHERE ready = 2 AND budget IS NOT NULL;
CREATE TABLE budget_use (
    name        TEXT NOT NULL,
    subject     TEXT NOT NULL,
    start       INTEGER NOT NULL,
    calls       INTEGER NOT NULL,
    tokens      INTEGER NOT NULL,
    nanos       INTEGER NOT NULL,
    held_calls  INTEGER NOT NULL,
    held_tokens INTEGER NOT NULL,
    held_nanos  INTEGER NOT NULL,
    told        INTEGER NOT NULL,
    told_of     INTEGER NOT NULL,
    PRIMARY KEY (name, subject, start)
);
CREATE TABLE demand (
    request INTEGER PRIMARY KEY,
    asks    BLOB,
    hold    BLOB
);

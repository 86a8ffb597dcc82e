-- From layout 7 to 8: a request may wait for a person's answer.

ALTER TABLE request ADD COLUMN question TEXT; -- what a person is asked, with the answer, as JSON
ALTER TABLE request ADD COLUMN asks INTEGER NOT NULL DEFAULT 0; -- 1: the question is open
CREATE INDEX asking ON request (key) WHERE asks = 1;

-- From layout 9 to 10: agents take turns. What waits already keeps its order, before what comes.

ALTER TABLE request ADD COLUMN tag INTEGER NOT NULL DEFAULT 0; -- its place in its priority, see ksi.store.rules.fairness
ALTER TABLE request ADD COLUMN flow TEXT; -- whom that counts for: an agent, or what stands for one
DROP INDEX ready;
CREATE INDEX ready ON request (route, priority, tag, rank, key) WHERE ready = 1;

-- From layout 5 to 6: a long result for many conversations is kept once. What is there already stays as it is.

CREATE TABLE passage (
    id   INTEGER PRIMARY KEY,
    data BLOB NOT NULL
);
ALTER TABLE body ADD COLUMN passage INTEGER;
ALTER TABLE body ADD COLUMN place INTEGER;
ALTER TABLE body ADD COLUMN reminded_place INTEGER;
ALTER TABLE injection ADD COLUMN passage INTEGER;
ALTER TABLE injection ADD COLUMN place INTEGER;
ALTER TABLE injection ADD COLUMN child_place INTEGER;
CREATE INDEX bodies_with ON body (passage) WHERE passage IS NOT NULL;
CREATE INDEX injections_with ON injection (passage) WHERE passage IS NOT NULL;
-- A passage goes with the last that refers to it.
CREATE TRIGGER body_dropped AFTER DELETE ON body WHEN old.passage IS NOT NULL
BEGIN
    DELETE FROM passage WHERE id = old.passage
        AND NOT EXISTS (SELECT 1 FROM body WHERE passage = old.passage)
        AND NOT EXISTS (SELECT 1 FROM injection WHERE passage = old.passage);
END;
CREATE TRIGGER injection_dropped AFTER DELETE ON injection WHEN old.passage IS NOT NULL
BEGIN
    DELETE FROM passage WHERE id = old.passage
        AND NOT EXISTS (SELECT 1 FROM body WHERE passage = old.passage)
        AND NOT EXISTS (SELECT 1 FROM injection WHERE passage = old.passage);
END;
CREATE VIEW whole_body AS
SELECT request, model, agent, requeued_from,
    CASE WHEN place IS NULL THEN data ELSE CAST(
        substr(data, 1, place) || (SELECT p.data FROM passage p WHERE p.id = body.passage) || substr(data, place + 1)
    AS BLOB) END AS data,
    CASE WHEN reminded_place IS NULL THEN reminders ELSE
        substr(reminders, 1, reminded_place) || CAST((SELECT p.data FROM passage p WHERE p.id = body.passage) AS TEXT)
        || substr(reminders, reminded_place + 1)
    END AS reminders
FROM body;

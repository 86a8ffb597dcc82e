-- The index of full text: a file of its own. `reached` is the last turn that it has, `deletions` how many conversations had
-- been deleted from the database when it was made.

-- name: make_known
CREATE TABLE known (layout INTEGER NOT NULL, reached INTEGER NOT NULL, deletions INTEGER NOT NULL);
-- name: make_words
CREATE VIRTUAL TABLE words USING fts5(
    said, content = '', contentless_delete = 1, tokenize = 'unicode61 remove_diacritics 0'
);
-- name: begin
INSERT INTO known VALUES (?, 0, ?);
-- name: known
SELECT layout, reached, deletions FROM known;
-- name: set_reached
UPDATE known SET reached = ?;
-- name: add_words
INSERT INTO words (rowid, said) VALUES (?, ?);
-- name: drop_words
DELETE FROM words WHERE rowid = ?;
-- name: search
SELECT rowid FROM words WHERE words MATCH ?1 AND rowid < ?2 ORDER BY rowid DESC LIMIT ?3;

-- What is read of the database.

-- name: deletions
SELECT coalesce((SELECT value FROM total WHERE name = 'deleted'), 0);
-- name: turns_behind
SELECT a.id, b.data, a.text FROM attempt a JOIN whole_body b ON b.request = a.request
WHERE a.id > ?1 AND a.outcome = 'completed' ORDER BY a.id LIMIT ?2;
-- name: last_turn
SELECT coalesce(max(id), 0) FROM attempt;
-- name: turn_found
SELECT c.name, b.data, a.text, a.provider, a.finished_at FROM attempt a
    JOIN whole_body b ON b.request = a.request JOIN conversation c ON c.id = a.conversation
WHERE a.id = ?1 AND a.outcome = 'completed';

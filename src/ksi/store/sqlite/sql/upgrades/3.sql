-- From layout 2 to 3: a turn no longer writes the index by which idle conversations are found.

ALTER TABLE conversation ADD COLUMN looked_at INTEGER NOT NULL DEFAULT 0;
UPDATE conversation SET looked_at = active_at;
DROP INDEX conversation_activity;
CREATE INDEX conversation_looked_at ON conversation (looked_at);
CREATE TRIGGER conversation_clock AFTER UPDATE OF active_at ON conversation WHEN new.active_at < new.looked_at
BEGIN
    UPDATE conversation SET looked_at = new.active_at WHERE id = new.id;
END;

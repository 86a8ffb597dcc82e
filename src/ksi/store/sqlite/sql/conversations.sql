-- Renaming and deleting conversations, by name. What looks through whole tables runs on a connection of its own.

-- name: own_conversation
SELECT id, name, created_at FROM conversation
WHERE id = coalesce((SELECT id FROM conversation WHERE name = ?1), (SELECT conversation FROM alias WHERE name = ?1));
-- name: meant_by
SELECT coalesce((SELECT id FROM conversation WHERE name = ?1), (SELECT conversation FROM alias WHERE name = ?1));
-- name: rename
UPDATE conversation SET name = ?2 WHERE id = ?1;
-- name: drop_alias
DELETE FROM alias WHERE name = ?;
-- name: rename_in_forks
UPDATE fork SET from_name = iif(parent = ?1 AND from_name = ?2, ?3, from_name),
    to_name = iif(child = ?1 AND to_name = ?2, ?3, to_name)
WHERE parent = ?1 OR child = ?1;

-- name: not_ended
SELECT request_id FROM request WHERE conversation = ?1 AND place = 1
UNION ALL SELECT request_id FROM request WHERE conversation = ?1 AND place = 0
UNION ALL SELECT request_id FROM request WHERE conversation = ?1 AND place = 2 LIMIT 1;
-- name: living_forks
SELECT DISTINCT c.name FROM fork f JOIN conversation c ON c.id = f.child
WHERE f.parent = ?1 AND f.child <> ?1 ORDER BY c.id LIMIT 100;
-- name: requests_of
SELECT key, request_id, last_attempt, chain FROM request
WHERE conversation = ?1 AND key > ?2 ORDER BY key;
-- name: routing_of
SELECT routing FROM member WHERE request = ?;
-- name: turns_of
WITH RECURSIVE turn (id, request, previous) AS (
    SELECT a.id, a.request, a.previous FROM conversation c JOIN attempt a ON a.id = c.head
    WHERE c.id = ?1 AND a.conversation = ?1
    UNION ALL
    SELECT a.id, a.request, a.previous FROM turn t JOIN attempt a ON a.id = t.previous WHERE a.conversation = ?1
)
SELECT id, request FROM turn;
-- name: other_attempts_of
SELECT id FROM attempt INDEXED BY spare_attempt WHERE outcome <> 'completed' AND conversation = ?1;
-- name: attempts_back
WITH RECURSIVE trail (id, earlier) AS (
    SELECT id, earlier FROM attempt WHERE id = ?1
    UNION ALL SELECT a.id, a.earlier FROM attempt a JOIN trail t ON a.id = t.earlier
)
SELECT id FROM trail;
-- name: forget_attempt
-- 0 is no conversation: a new one may get the deleted one's number.
UPDATE attempt SET conversation = 0, outcome = iif(outcome = 'completed', 'forgotten', outcome), earlier = NULL, previous = NULL,
    stop_reason = NULL, provider_session = NULL, last_message = NULL, fork = NULL, message = NULL, text = NULL, raw = NULL,
    content = NULL
WHERE id = ?;
-- name: deliveries_of
SELECT id, target FROM injection
WHERE finished_at IS NOT NULL AND parent_key IN (SELECT value FROM json_each(?1))
UNION SELECT id, target FROM injection WHERE finished_at IS NOT NULL AND target IN (SELECT value FROM json_each(?2))
UNION SELECT id, target FROM injection WHERE conversation = ?3;
-- name: aliases_of
SELECT name FROM alias WHERE conversation = ? ORDER BY name;
-- name: drop_delivery
DELETE FROM injection WHERE id = ?;

-- Chains and deliveries, by name. A name's text goes up to the next name.

-- name: chain_parent
SELECT r.key, r.external, r.state, r.enqueued_at, r.last_attempt, r.chain, m.depth, m.max_depth, m.token_budget,
    m.time_window
FROM request r LEFT JOIN member m ON m.request = r.key AND r.chain IS NOT NULL WHERE r.request_id = ?;
-- name: chain_figures
SELECT id, name, created_at, started_at, max_depth, token_budget, time_window, used, estimated, reserved, members,
    unfinished, deepest, closed, tripped, guard_messages, resets, reset_key
FROM chain WHERE id = ?;
-- name: chain_named
SELECT id FROM chain WHERE name = ?;
-- name: add_chain
INSERT INTO chain (name, created_at, started_at, max_depth, token_budget, time_window, used, estimated)
VALUES (?, ?, ?, ?, ?, ?, ?, ?) RETURNING id;
-- name: add_member
INSERT INTO member (
    request, chain, parent, parent_key, depth, max_depth, token_budget, time_window, estimate, output_cap, guard, routing,
    tokens, estimated, carries, mark, block
) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?);
-- name: join_chain
UPDATE request SET chain = ?2 WHERE key = ?1;
-- name: grow_chain
UPDATE chain SET members = members + ?2, unfinished = unfinished + ?3, deepest = max(deepest, ?4),
    guard_messages = guard_messages + ?5
WHERE id = ?1;
-- name: trip_chain
UPDATE chain SET tripped = coalesce(tripped, ?2) WHERE id = ?1;
-- name: count_guard
UPDATE chain SET guard_messages = guard_messages + 1 WHERE id = ?;

-- name: member
SELECT chain, parent, parent_key, depth, max_depth, token_budget, time_window, estimate, output_cap, guard, routing,
    reserved, tokens, estimated, carries, mark, result, block
FROM member WHERE request = ?;
-- name: reserve
UPDATE member SET reserved = ?2 WHERE request = ?1;
-- name: reserve_in_chain
UPDATE chain SET reserved = reserved + ?2 WHERE id = ?1;
-- name: charge
UPDATE member SET reserved = 0, tokens = tokens + ?2, estimated = max(estimated, ?3) WHERE request = ?1;
-- name: charge_chain
UPDATE chain SET reserved = reserved - ?2, used = used + ?3, estimated = estimated + ?4 WHERE id = ?1;
-- name: leave_member
UPDATE member SET routing = ?2, block = ?3 WHERE request = ?1;
-- name: leave_chain
UPDATE chain SET unfinished = unfinished - 1 WHERE id = ?;
-- name: set_routing
UPDATE member SET routing = ?2 WHERE request = ?1;
-- name: set_result
UPDATE member SET result = ?2 WHERE request = ?1;

-- name: take_reminders
UPDATE injection SET state = 1, conversation = NULL, carrier = ?2, request_id = ?3
WHERE conversation = ?1
RETURNING id, name, text, place, (SELECT data FROM passage WHERE passage.id = injection.passage);
-- name: no_reminders_wait
UPDATE conversation SET reminders = 0 WHERE id = ?;
-- name: note_reminded
UPDATE request SET reminded = ?2 WHERE key = ?1;
-- name: put_reminders_back
UPDATE injection SET state = 0, conversation = ?2, carrier = NULL, request_id = NULL WHERE carrier = ?1 AND state = 1;
-- name: more_reminders_wait
UPDATE conversation SET reminders = reminders + ?2 WHERE id = ?1;
-- name: use_reminders
UPDATE injection SET state = 2, finished_at = ?2 WHERE carrier = ?1 AND state = 1
RETURNING id, text, place, (SELECT data FROM passage WHERE passage.id = injection.passage), passage;
-- name: keep_reminders
UPDATE body SET reminders = ?2, passage = coalesce(?3, passage), reminded_place = ?4 WHERE request = ?1;
-- name: passage_of_body
SELECT passage FROM body WHERE request = ?;
-- name: add_passage
INSERT INTO passage (data) VALUES (?) RETURNING id;

-- name: injection_named
SELECT id, state, direct, parent, parent_key, passage FROM injection WHERE name = ?;
-- name: passage
SELECT data FROM passage WHERE id = ?;
-- name: name_taken
SELECT EXISTS (SELECT 1 FROM injection WHERE name = ?1) OR (?2 AND EXISTS (SELECT 1 FROM request WHERE request_id = ?1));
-- name: add_injection
INSERT INTO injection (
    name, chain, parent, parent_key, target, direct, trigger, state, created_at, finished_at, conversation, request_id, reason,
    text, child, passage, place, child_place
) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING id;
-- name: delivered
UPDATE injection SET state = 2, finished_at = ?2, child = NULL WHERE name = ?1;
-- name: bury
UPDATE injection SET state = ?2, finished_at = ?3, reason = ?4 WHERE name = ?1;
-- name: retried
UPDATE injection SET state = 5 WHERE name = ?;

-- name: close_chain
UPDATE chain SET closed = 1 WHERE id = ?;
-- name: unfinished
SELECT r.request_id FROM member m JOIN request r ON r.key = m.request
WHERE m.chain = ?1 AND r.finished_at IS NULL AND r.cancelling = 0 ORDER BY m.request LIMIT ?2;
-- name: reset_chain
UPDATE chain SET started_at = ?2, used = 0, estimated = 0, closed = 0, tripped = NULL, guard_messages = 0,
    resets = resets + 1, reset_key = ?3
WHERE id = ?1;
-- name: drop_member
DELETE FROM member WHERE request = ?;
-- name: shrink_chain
UPDATE chain SET members = members - (SELECT NOT guard FROM member WHERE request = ?2) WHERE id = ?1;
-- name: drop_empty_chain
DELETE FROM chain WHERE id = ?1 AND NOT EXISTS (SELECT 1 FROM member WHERE chain = ?1);
-- name: drop_injections
DELETE FROM injection WHERE id IN (
    SELECT id FROM injection WHERE finished_at <= ?1 ORDER BY finished_at, id LIMIT ?2
) RETURNING id;

-- name: unrouted
SELECT r.request_id FROM member m JOIN request r ON r.key = m.request WHERE m.routing = 2 ORDER BY m.request LIMIT ?;
-- name: injection_row
SELECT id, name, chain, parent, target, direct, trigger, state, created_at, finished_at, request_id, reason
FROM injection WHERE id = ?;
-- name: injection
SELECT id, name, chain, parent, target, direct, trigger, state, created_at, finished_at, request_id, reason, text, child,
    place, child_place, (SELECT data FROM passage WHERE passage.id = injection.passage)
FROM injection WHERE name = ?;
-- name: injections
SELECT id, name, chain, parent, target, direct, trigger, state, created_at, finished_at, request_id, reason
FROM injection WHERE id < ?1 ORDER BY id DESC LIMIT ?2;
-- name: injections_in
SELECT id, name, chain, parent, target, direct, trigger, state, created_at, finished_at, request_id, reason
FROM injection WHERE state = ?3 AND id < ?1 ORDER BY id DESC LIMIT ?2;
-- name: chain_of
SELECT m.chain, m.request FROM request r JOIN member m ON m.request = r.key WHERE r.request_id = ?;
-- name: chain_view
SELECT c.name, m.parent, m.depth, m.carries, m.block FROM member m JOIN chain c ON c.id = m.chain WHERE m.request = ?;
-- name: chains
SELECT id, name, created_at, started_at, max_depth, token_budget, time_window, used, estimated, reserved, members,
    unfinished, deepest, closed, tripped, guard_messages, resets, reset_key
FROM chain WHERE id < ?1 ORDER BY id DESC LIMIT ?2;
-- name: trail
WITH RECURSIVE hop (request, parent_key, step) AS (
    SELECT m.request, m.parent_key, 1 FROM member m WHERE m.request = ?1 AND m.request > ?2
    UNION ALL
    SELECT m.request, m.parent_key, h.step + 1 FROM hop h JOIN member m ON m.request = h.parent_key
    WHERE m.request > ?2 AND h.step < ?3
)
SELECT r.request_id, m.depth, c.name, b.agent, r.state, r.error, m.mark, m.result
FROM hop h JOIN member m ON m.request = h.request JOIN request r ON r.key = h.request JOIN body b ON b.request = h.request
    JOIN conversation c ON c.id = r.conversation
WHERE h.step <= ?3 ORDER BY h.step;
-- name: members
SELECT m.request, r.request_id, m.parent, m.depth, c.name, b.agent, r.state, r.enqueued_at, r.finished_at, m.tokens,
    m.estimated, m.block
FROM member m JOIN request r ON r.key = m.request JOIN body b ON b.request = m.request
    JOIN conversation c ON c.id = r.conversation
WHERE m.chain = ?1 AND m.request > ?2 ORDER BY m.request LIMIT ?3;

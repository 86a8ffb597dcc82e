-- Every statement of the SQLite store, by name. A name's text goes up to the next name.

-- name: totals
SELECT name, value FROM total;
-- name: set_totals
INSERT INTO total (name, value) SELECT key, value FROM json_each(?) WHERE true
ON CONFLICT (name) DO UPDATE SET value = excluded.value;
-- name: touch
-- Another value each time: a page that stays as it is is not written.
INSERT INTO total (name, value) VALUES ('touches', 1) ON CONFLICT (name) DO UPDATE SET value = value + 1;
-- name: last_key
SELECT max(
    coalesce((SELECT max(key) FROM request), 0), coalesce((SELECT max(request) FROM body), 0),
    coalesce((SELECT value FROM total WHERE name = 'last_key'), 0)
);
-- name: last_attempt
SELECT max(
    coalesce((SELECT max(id) FROM attempt), 0), coalesce((SELECT value FROM total WHERE name = 'log_watermark'), 0)
);

-- A name is a conversation's own, or a provider session that means it.
-- name: conversation
SELECT c.id, c.head, c.name FROM conversation c
WHERE c.id = coalesce((SELECT id FROM conversation WHERE name = ?1), (SELECT conversation FROM alias WHERE name = ?1));
-- name: add_alias
INSERT INTO alias (name, conversation) VALUES (?, ?);
-- name: drop_aliases
DELETE FROM alias WHERE conversation = ?;
-- name: session_at
SELECT provider_session FROM attempt WHERE id = ?;
-- name: arrival
SELECT id, head,
    (SELECT key FROM request WHERE conversation = c.id AND place = 1),
    (SELECT key FROM request WHERE conversation = c.id AND place = 0 LIMIT 1), name, reminders
FROM conversation c
WHERE c.id = coalesce((SELECT id FROM conversation WHERE name = ?1), (SELECT conversation FROM alias WHERE name = ?1));
-- name: conversation_name
SELECT name FROM conversation WHERE id = ?;
-- name: add_conversation
INSERT INTO conversation (name, created_at, active_at, looked_at, head, forked_from) VALUES (?1, ?2, ?2, ?2, ?3, ?4)
RETURNING id;
-- name: advance_conversation
UPDATE conversation SET head = ?2, turns = turns + 1, active_at = ?3 WHERE id = ?1;
-- name: touch_conversation
UPDATE conversation SET active_at = ?2 WHERE id = ?1;
-- name: add_agent
INSERT OR IGNORE INTO agent_conversation (agent, conversation) VALUES (?, ?);
-- name: add_fork
INSERT INTO fork (parent, child, from_name, to_name, request_id, at, kind) VALUES (?, ?, ?, ?, ?, ?, ?);

-- name: known
SELECT r.external, b.data
FROM request r JOIN whole_body b ON b.request = r.key WHERE r.request_id = ?;
-- A range of the index by name.
-- name: requests_named
SELECT request_id FROM request WHERE request_id >= ?1 AND request_id < CAST(?2 AS TEXT) ORDER BY request_id LIMIT ?3;
-- name: conversations_named
SELECT name FROM conversation WHERE name >= ?1 AND name < CAST(?2 AS TEXT) ORDER BY name LIMIT ?3;
-- name: named
SELECT key, state, external, conversation, place, fence, rank, chain FROM request WHERE request_id = ?;
-- name: holder
SELECT key, request_id, state, external, priority, since, chain FROM request WHERE conversation = ? AND place = 1;
-- name: line_heads
SELECT key, request_id, external, ready, rank FROM request
WHERE conversation = ? AND place = 0 ORDER BY rank, key LIMIT 2;
-- name: line_before
SELECT count(*) FROM (
    SELECT 1 FROM request WHERE conversation = ?1 AND place = 0 AND (rank, key) < (?2, ?3) LIMIT ?4
);
-- name: line_length
SELECT count(*) FROM (SELECT 1 FROM request WHERE conversation = ? AND place = 0 LIMIT ?);

-- name: add_request
INSERT INTO request (
    key, request_id, conversation, state, place, ready, external, priority, rank, hold, route, provider, attempt,
    interruptions, fence, token, enqueued_at, due, expires, deadline, term, since, started_at, cancelling
) VALUES (?1, ?2, ?3, ?4, ?5, 0, ?6, ?7, ?8, ?9, ?10, ?11, ?12, 0, ?13, ?14, ?15, ?16, ?17, ?18, ?19, ?20, ?20, 0);
-- name: add_body
INSERT INTO body (request, model, agent, requeued_from, data) VALUES (?, ?, ?, ?, ?);
-- name: add_cut_body
INSERT INTO body (request, model, agent, requeued_from, data, passage, place) VALUES (?, ?, ?, ?, ?, ?, ?);
-- name: drop_request
DELETE FROM request WHERE key = ?;
-- name: drop_body
DELETE FROM body WHERE request = ?;
-- name: prune_body
DELETE FROM body WHERE request = ? RETURNING octet_length(data) + ifnull(octet_length(reminders), 0);

-- name: set_ready
UPDATE request SET ready = ?2, budget = NULL, budget_end = NULL WHERE key = ?1;
-- name: grant
UPDATE request SET state = 2, place = 1, ready = 0, fence = ?2, since = ?3, deadline = ?4, due = ?5 WHERE key = ?1;
-- name: renew_grant
UPDATE request SET deadline = ?2, due = ?3 WHERE key = ?1;
-- name: renew_waiter
UPDATE request SET deadline = ?2 WHERE key = ?1;

-- name: provider_load
SELECT count(*) FROM request WHERE provider = ? AND state = 2 AND external = 0;
-- name: ready_heads
SELECT * FROM (SELECT priority, tag, rank, key FROM request WHERE ready = 1 AND route = ?1 AND priority = 0 AND (expires IS NULL OR expires > ?2)
    ORDER BY tag, rank, key LIMIT ?3)
UNION ALL SELECT * FROM (SELECT priority, tag, rank, key FROM request WHERE ready = 1 AND route = ?1 AND priority = 1 AND (expires IS NULL OR expires > ?2)
    ORDER BY tag, rank, key LIMIT ?3)
UNION ALL SELECT * FROM (SELECT priority, tag, rank, key FROM request WHERE ready = 1 AND route = ?1 AND priority = 2 AND (expires IS NULL OR expires > ?2)
    ORDER BY tag, rank, key LIMIT ?3)
UNION ALL SELECT * FROM (SELECT priority, tag, rank, key FROM request WHERE ready = 1 AND route = ?1 AND priority = 3 AND (expires IS NULL OR expires > ?2)
    ORDER BY tag, rank, key LIMIT ?3)
UNION ALL SELECT * FROM (SELECT priority, tag, rank, key FROM request WHERE ready = 1 AND route = ?1 AND priority = 4 AND (expires IS NULL OR expires > ?2)
    ORDER BY tag, rank, key LIMIT ?3);
-- name: ready_heads_named
SELECT r.priority, r.tag, r.rank, r.key, b.agent, c.name
FROM (
    SELECT * FROM (SELECT priority, tag, rank, key, conversation FROM request WHERE ready = 1 AND route = ?1 AND priority = 0 AND (expires IS NULL OR expires > ?2)
    ORDER BY tag, rank, key LIMIT ?3)
    UNION ALL SELECT * FROM (SELECT priority, tag, rank, key, conversation FROM request WHERE ready = 1 AND route = ?1 AND priority = 1 AND (expires IS NULL OR expires > ?2)
    ORDER BY tag, rank, key LIMIT ?3)
    UNION ALL SELECT * FROM (SELECT priority, tag, rank, key, conversation FROM request WHERE ready = 1 AND route = ?1 AND priority = 2 AND (expires IS NULL OR expires > ?2)
    ORDER BY tag, rank, key LIMIT ?3)
    UNION ALL SELECT * FROM (SELECT priority, tag, rank, key, conversation FROM request WHERE ready = 1 AND route = ?1 AND priority = 3 AND (expires IS NULL OR expires > ?2)
    ORDER BY tag, rank, key LIMIT ?3)
    UNION ALL SELECT * FROM (SELECT priority, tag, rank, key, conversation FROM request WHERE ready = 1 AND route = ?1 AND priority = 4 AND (expires IS NULL OR expires > ?2)
    ORDER BY tag, rank, key LIMIT ?3)
) r JOIN body b ON b.request = r.key JOIN conversation c ON c.id = r.conversation;
-- name: take_turn
UPDATE request SET tag = ?2, flow = ?3 WHERE key = ?1;
-- name: flow
SELECT priority, flow FROM request WHERE key = ?;
-- name: waiting_flows
SELECT priority, flow, min(tag), max(tag) FROM request WHERE place = 0 AND flow IS NOT NULL AND tag > 0 GROUP BY priority, flow;
-- name: forget_turns
UPDATE request SET tag = 0 WHERE place = 0 AND tag > 0;
-- name: next_flows
SELECT priority, tag, rank, flow, request_id FROM request WHERE ready = 1 AND route = ?1 AND priority = ?2
ORDER BY tag, rank, key LIMIT ?3;
-- name: set_aside
SELECT r.route, r.rank, r.key, b.agent, c.name, r.priority
FROM (
    SELECT route, rank, key, conversation, priority FROM request
    WHERE ready = 2 AND budget IS NULL AND (route, rank, key) > (?1, ?2, ?3) ORDER BY route, rank, key LIMIT ?4
) r JOIN body b ON b.request = r.key JOIN conversation c ON c.id = r.conversation ORDER BY r.route, r.rank, r.key;
-- name: claimable
SELECT r.request_id, r.place, r.priority, r.route, r.attempt, r.enqueued_at, b.data, b.agent, b.requeued_from, c.name,
    c.head, c.id, c.reminders, r.chain, r.hold, r.last_attempt, b.model, r.tag
FROM request r JOIN whole_body b ON b.request = r.key JOIN conversation c ON c.id = r.conversation WHERE r.key = ?;
-- name: start
UPDATE request SET state = 2, place = 1, ready = 0, provider = ?2, fence = ?3, token = ?4, attempt = attempt + 1,
    started_at = ?5, since = CASE place WHEN 1 THEN since ELSE ?5 END, expires = NULL
WHERE key = ?1;

-- name: to_settle
SELECT r.request_id, r.state, r.fence, r.token, r.conversation, r.hold, r.route, r.cancelling, r.last_attempt, c.head,
    r.chain, r.reminded
FROM request r JOIN conversation c ON c.id = r.conversation WHERE r.key = ?;
-- name: add_attempt
INSERT INTO attempt (
    id, request, earlier, previous, conversation, agent, number, provider, outcome, started_at, finished_at, first_token,
    model, asked, mcp, stop_reason, provider_session, last_message, fork, error, message, input_tokens, output_tokens,
    cache_read, cache_write, reasoning, cost, text, content, raw
) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?);
-- name: note_attempt
UPDATE request SET last_attempt = ?2 WHERE key = ?1;
-- name: attempt_numbered
WITH RECURSIVE trail (id, earlier, number, outcome) AS (
    SELECT id, earlier, number, outcome FROM attempt WHERE id = ?1
    UNION ALL SELECT a.id, a.earlier, a.number, a.outcome FROM attempt a JOIN trail t ON a.id = t.earlier
)
SELECT 1 FROM trail WHERE number = ?2 AND outcome <> 'interrupted';
-- name: finish
UPDATE request SET state = ?2, place = NULL, ready = 0, finished_at = ?3, error = ?4, message = ?5, due = NULL,
    last_attempt = coalesce(?6, last_attempt), provider = ?7, cancelling = 0, asks = 0
WHERE key = ?1;
-- name: delay
UPDATE request SET state = ?2, place = ?3, ready = 0, due = ?4, route = ?5, error = ?6, message = ?7, last_attempt = ?8,
    provider = NULL, question = ?9, asks = ?10
WHERE key = ?1;
-- name: ask
UPDATE request SET question = ?2, asks = 1, message = ?3 WHERE key = ?1;
-- name: asked
SELECT key, state, external, conversation, place, chain, question, asks FROM request WHERE request_id = ?;
-- name: note_answer
UPDATE request SET question = ?2, asks = 0, due = CASE WHEN ?3 IS NULL THEN due ELSE ?3 END, expires = ?4 WHERE key = ?1;
-- name: requeue
UPDATE request SET state = 1, place = 1, ready = 1, provider = NULL, last_attempt = ?2, interruptions = interruptions + ?3
WHERE key = ?1;
-- name: mark_cancelling
UPDATE request SET cancelling = 1 WHERE key = ?;
-- name: mark_interrupted
UPDATE request SET interrupted_by = coalesce(interrupted_by, ?2) WHERE key = ?1;

-- name: due_requests
SELECT key, request_id, conversation, state, place, chain, expires FROM request
WHERE state IN (0, 3, 4) AND due <= ?1 ORDER BY due, key LIMIT ?2;
-- name: wake_kept
UPDATE request SET state = 1, ready = 1, due = NULL, asks = 0 WHERE key = ?;
-- name: wake_into_line
UPDATE request SET state = 1, place = 0, due = NULL, asks = 0 WHERE key = ?;
-- name: overdue_requests
SELECT key, request_id, conversation, state, place, chain FROM request
WHERE expires <= ?1 AND state IN (0, 1) ORDER BY expires, key LIMIT ?2;
-- name: lapsed_waiters
SELECT key, request_id, conversation, place FROM request
WHERE deadline <= ?1 AND place = 0 ORDER BY deadline, key LIMIT ?2;
-- name: lapsed_locks
SELECT key, request_id, conversation, place FROM request
WHERE deadline <= ?1 AND place = 1 ORDER BY deadline, key LIMIT ?2;
-- name: unpark
UPDATE request SET due = ?2 WHERE key IN (
    SELECT key FROM request WHERE state IN (0, 3, 4) AND state = 4 AND route = ?1 AND due > ?2 AND asks = 0 ORDER BY due, key LIMIT ?3
) RETURNING key;
-- name: next_due
SELECT min(due) FROM request WHERE state IN (0, 3, 4);
-- name: next_expiry
SELECT min(expires) FROM request WHERE expires IS NOT NULL AND state IN (0, 1);
-- name: next_deadline
SELECT min(deadline) FROM request WHERE deadline IS NOT NULL;

-- name: left_running
SELECT r.key, r.request_id, r.conversation, r.provider, r.attempt, r.interruptions, r.started_at, r.cancelling,
    r.last_attempt, b.agent, b.model, b.data, r.chain, r.reminded
FROM request r JOIN whole_body b ON b.request = r.key WHERE r.state = 2 AND r.external = 0 AND r.place = 1 ORDER BY r.key;
-- name: external_locks
SELECT key, request_id, conversation, place, term FROM request WHERE external = 1 AND state IN (1, 2) ORDER BY key;

-- name: prunable_requests
SELECT key, state, chain FROM request
WHERE finished_at <= ?1 AND NOT (state = 5 AND last_attempt > ?2)
  AND (chain IS NULL OR NOT EXISTS (SELECT 1 FROM member m WHERE m.request = key AND m.routing = 2))
ORDER BY finished_at, key LIMIT ?3;
-- name: look_at_conversations
UPDATE conversation SET looked_at = active_at
WHERE id IN (SELECT id FROM conversation WHERE looked_at <= ?1 AND active_at > looked_at ORDER BY looked_at LIMIT ?2)
RETURNING 1;
-- name: prunable_conversations
SELECT c.id FROM conversation c
WHERE c.looked_at <= ?1 AND c.active_at = c.looked_at
  AND NOT EXISTS (SELECT 1 FROM request r WHERE r.conversation = c.id AND r.place = 1)
  AND NOT EXISTS (SELECT 1 FROM request r WHERE r.conversation = c.id AND r.place = 0)
  AND NOT EXISTS (SELECT 1 FROM request r WHERE r.conversation = c.id AND r.place = 2)
  AND NOT EXISTS (SELECT 1 FROM fork f WHERE f.parent = c.id AND f.child <> c.id)
  AND (c.head IS NULL OR c.head <= ?2) AND c.reminders = 0
  AND NOT EXISTS (SELECT 1 FROM member m JOIN request r ON r.key = m.request WHERE m.routing = 2 AND r.conversation = c.id)
ORDER BY c.looked_at, c.id LIMIT ?3;
-- name: turns_to_drop
WITH RECURSIVE turn (id, request, previous, depth) AS (
    SELECT a.id, a.request, a.previous, 1 FROM conversation c JOIN attempt a ON a.id = c.head
    WHERE c.id = ?1 AND a.conversation = ?1
    UNION ALL
    SELECT a.id, a.request, a.previous, t.depth + 1 FROM turn t JOIN attempt a ON a.id = t.previous
    WHERE a.conversation = ?1 AND t.depth < ?2
)
SELECT id, request, previous FROM turn;
-- name: prune_attempt
DELETE FROM attempt WHERE id = ?
RETURNING ifnull(octet_length(text), 0) + ifnull(octet_length(raw), 0) + ifnull(octet_length(content), 0);
-- name: set_head
UPDATE conversation SET head = ?2 WHERE id = ?1;
-- name: drop_conversation
DELETE FROM conversation WHERE id = ?;
-- name: drop_agents
DELETE FROM agent_conversation WHERE conversation = ?;
-- name: drop_forks
DELETE FROM fork WHERE child = ?;
-- name: spare_attempts
SELECT id FROM attempt
WHERE outcome <> 'completed' AND finished_at <= ?1 AND NOT EXISTS (SELECT 1 FROM request WHERE key = attempt.request)
ORDER BY finished_at LIMIT ?2;

-- name: view
SELECT r.key, r.request_id, r.conversation, c.name, r.state, r.priority, r.route, r.enqueued_at, r.due, r.expires,
    r.started_at, r.finished_at, r.provider, r.error, r.message, r.interruptions, r.interrupted_by, r.cancelling,
    r.last_attempt, r.place, r.rank, b.model, b.agent, b.requeued_from, b.data, r.chain, r.question,
    CASE r.ready WHEN 2 THEN r.budget END
FROM request r JOIN whole_body b ON b.request = r.key JOIN conversation c ON c.id = r.conversation
WHERE r.request_id = ? AND r.external = 0;
-- name: attempt
SELECT earlier, number, provider, outcome, started_at, finished_at, first_token, model, asked, mcp, stop_reason,
    provider_session, last_message, fork, error, message, input_tokens, output_tokens, cache_read, cache_write, reasoning,
    cost, text, content, raw
FROM attempt WHERE id = ?;
-- name: turn
SELECT a.id, b.data, coalesce(a.text, ''), a.provider, a.provider_session, a.finished_at, a.previous, a.last_message,
    c.name, b.reminders, a.content
FROM attempt a JOIN whole_body b ON b.request = a.request JOIN conversation c ON c.id = a.conversation WHERE a.id = ?;

-- name: session
SELECT c.id, c.name, c.created_at, c.active_at, c.turns, c.head, a.provider, a.provider_session, f.name,
    EXISTS (SELECT 1 FROM request r WHERE r.conversation = c.id AND r.place = 1)
FROM conversation c LEFT JOIN attempt a ON a.id = c.head AND a.conversation = c.id LEFT JOIN conversation f ON f.id = c.forked_from
WHERE c.id = coalesce((SELECT id FROM conversation WHERE name = ?1), (SELECT conversation FROM alias WHERE name = ?1));
-- name: sessions
SELECT c.id, c.name, c.created_at, c.active_at, c.turns, c.head, a.provider, a.provider_session, f.name,
    EXISTS (SELECT 1 FROM request r WHERE r.conversation = c.id AND r.place = 1)
FROM conversation c LEFT JOIN attempt a ON a.id = c.head AND a.conversation = c.id LEFT JOIN conversation f ON f.id = c.forked_from
WHERE c.id < ?1 ORDER BY c.id DESC LIMIT ?2;
-- name: sessions_of_agent
SELECT c.id, c.name, c.created_at, c.active_at, c.turns, c.head, a.provider, a.provider_session, f.name,
    EXISTS (SELECT 1 FROM request r WHERE r.conversation = c.id AND r.place = 1)
FROM agent_conversation g JOIN conversation c ON c.id = g.conversation
    LEFT JOIN attempt a ON a.id = c.head AND a.conversation = c.id LEFT JOIN conversation f ON f.id = c.forked_from
WHERE g.agent = ?3 AND g.conversation < ?1 ORDER BY g.conversation DESC LIMIT ?2;
-- name: agents
SELECT agent FROM agent_conversation WHERE conversation = ? ORDER BY id LIMIT 100;

-- name: lock
SELECT c.id, c.name, r.request_id, r.external, r.state, r.since, r.due, r.fence, b.data
FROM conversation c LEFT JOIN request r ON r.conversation = c.id AND r.place = 1 LEFT JOIN body b ON b.request = r.key
WHERE c.id = coalesce((SELECT id FROM conversation WHERE name = ?1), (SELECT conversation FROM alias WHERE name = ?1));
-- name: line
SELECT request_id, priority, external, enqueued_at FROM request
WHERE conversation = ?1 AND place = 0 ORDER BY rank, key LIMIT ?2;
-- name: locks
SELECT r.conversation, c.name, r.request_id, r.external, r.state, r.since, r.due, r.fence, b.data
FROM request r INDEXED BY holder JOIN conversation c ON c.id = r.conversation JOIN body b ON b.request = r.key
WHERE r.place = 1 AND r.conversation > ?1 ORDER BY r.conversation LIMIT ?2;

-- name: forks
SELECT id, from_name, to_name, request_id, at, kind FROM fork WHERE id > ?1 ORDER BY id LIMIT ?2;
-- name: fork_tree
WITH RECURSIVE
    up (id) AS (
        SELECT coalesce((SELECT id FROM conversation WHERE name = ?3), (SELECT conversation FROM alias WHERE name = ?3))
        UNION SELECT f.parent FROM fork f JOIN up ON f.child = up.id
    ),
    tree (id) AS (
        SELECT id FROM up
        UNION SELECT f.child FROM fork f JOIN tree ON f.parent = tree.id
    )
SELECT f.id, f.from_name, f.to_name, f.request_id, f.at, f.kind FROM fork f
WHERE f.parent IN (SELECT id FROM tree) AND f.id > ?1 ORDER BY f.id LIMIT ?2;

-- name: rows_active
SELECT 0, 0, r.request_id, c.name, r.state, r.priority, b.model, b.agent, r.attempt, r.enqueued_at, r.due, r.started_at,
    r.finished_at, r.provider, r.error, r.message, NULL, r.question, r.key
FROM (SELECT key FROM request INDEXED BY running WHERE state = 2 AND external = 0 AND key > ?3) k
    JOIN request r ON r.key = k.key JOIN body b ON b.request = r.key JOIN conversation c ON c.id = r.conversation
ORDER BY k.key LIMIT ?4;
-- name: rows_ready
SELECT r.rank, r.route, r.request_id, c.name, r.state, r.priority, b.model, b.agent, r.attempt, r.enqueued_at, r.due,
    r.started_at, r.finished_at, r.provider, r.error, r.message, NULL, r.question, r.key
FROM (
    SELECT route, rank, key FROM request WHERE ready = 1 AND (route, rank, key) > (?2, ?1, ?3)
    UNION ALL SELECT route, rank, key FROM request WHERE ready = 2 AND (route, rank, key) > (?2, ?1, ?3)
    ORDER BY route, rank, key LIMIT ?4
) k JOIN request r ON r.key = k.key JOIN body b ON b.request = r.key JOIN conversation c ON c.id = r.conversation
ORDER BY k.route, k.rank, k.key;
-- name: rows_waiting
SELECT r.rank, r.conversation, r.request_id, c.name, r.state, r.priority, b.model, b.agent, r.attempt, r.enqueued_at, r.due,
    r.started_at, r.finished_at, r.provider, r.error, r.message, NULL, r.question, r.key
FROM request r JOIN body b ON b.request = r.key JOIN conversation c ON c.id = r.conversation
WHERE r.place = 0 AND r.external = 0 AND (r.conversation, r.rank, r.key) > (?2, ?1, ?3)
ORDER BY r.conversation, r.rank, r.key LIMIT ?4;
-- name: rows_delayed
SELECT r.due, 0, r.request_id, c.name, r.state, r.priority, b.model, b.agent, r.attempt, r.enqueued_at, r.due, r.started_at,
    r.finished_at, r.provider, r.error, r.message,
    CASE WHEN r.state IN (3, 4) THEN (SELECT finished_at FROM attempt WHERE id = r.last_attempt) END, r.question, r.key
FROM request r JOIN body b ON b.request = r.key JOIN conversation c ON c.id = r.conversation
WHERE r.state IN (0, 3, 4) AND (r.due, r.key) > (?1, ?3) ORDER BY r.due, r.key LIMIT ?4;
-- name: rows_asking
SELECT 0, 0, r.request_id, c.name, r.state, r.priority, b.model, b.agent, r.attempt, r.enqueued_at, r.due, r.started_at,
    r.finished_at, r.provider, r.error, r.message,
    CASE WHEN r.state IN (3, 4) THEN (SELECT finished_at FROM attempt WHERE id = r.last_attempt) END, r.question, r.key
FROM (SELECT key FROM request INDEXED BY asking WHERE asks = 1 AND key > ?3) k
    JOIN request r ON r.key = k.key JOIN body b ON b.request = r.key JOIN conversation c ON c.id = r.conversation
ORDER BY k.key LIMIT ?4;
-- name: rows_failed
SELECT r.finished_at, 0, r.request_id, c.name, r.state, r.priority, b.model, b.agent, r.attempt, r.enqueued_at, r.due,
    r.started_at, r.finished_at, r.provider, r.error, r.message, NULL, r.question, r.key
FROM request r JOIN body b ON b.request = r.key JOIN conversation c ON c.id = r.conversation
WHERE r.state = 6 AND (r.finished_at, r.key) < (?1, ?3) ORDER BY r.finished_at DESC, r.key DESC LIMIT ?4;
-- name: rows_finished
SELECT r.finished_at, 0, r.request_id, c.name, r.state, r.priority, b.model, b.agent, r.attempt, r.enqueued_at, r.due,
    r.started_at, r.finished_at, r.provider, r.error, r.message, NULL, r.question, r.key
FROM request r JOIN body b ON b.request = r.key JOIN conversation c ON c.id = r.conversation
WHERE r.finished_at IS NOT NULL AND (r.finished_at, r.key) < (?1, ?3)
ORDER BY r.finished_at DESC, r.key DESC LIMIT ?4;

-- name: waiting_by_priority
SELECT priority, count(*) FROM (
    SELECT priority FROM request WHERE place = 0 AND external = 0
    UNION ALL SELECT priority FROM request WHERE place = 1 AND state = 1 AND external = 0
    UNION ALL SELECT priority FROM request WHERE state IN (0, 3, 4)
) GROUP BY priority;
-- name: routes
SELECT name FROM route ORDER BY name;
-- name: add_route
INSERT OR IGNORE INTO route (name) VALUES (?);
-- name: ready_count
SELECT count(*) FROM (
    SELECT 1 FROM request WHERE ready = 1 AND route = ?1
    UNION ALL SELECT 1 FROM request WHERE ready = 2 AND route = ?1 LIMIT ?2
);

-- name: logged
SELECT a.id, r.request_id, c.name, b.agent, a.number, a.provider, a.outcome, a.started_at, a.finished_at, a.first_token,
    a.model, a.asked, a.mcp, a.stop_reason, a.provider_session, a.last_message, a.fork, a.error, a.message,
    a.input_tokens, a.output_tokens, a.cache_read, a.cache_write, a.reasoning, a.cost, a.text, a.content, a.raw
FROM attempt a JOIN request r ON r.key = a.request JOIN body b ON b.request = a.request
    JOIN conversation c ON c.id = a.conversation
WHERE a.id > ?1 AND a.outcome = 'completed' ORDER BY a.id LIMIT ?2;

-- name: provider_records
SELECT name, version, value FROM provider_record;
-- name: put_provider_record
INSERT INTO provider_record (name, version, value) VALUES (?1, ?2, ?3)
ON CONFLICT (name) DO UPDATE SET version = ?2, value = ?3;

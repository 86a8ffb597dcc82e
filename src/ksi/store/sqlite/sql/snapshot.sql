-- Saving everything, and taking it in, by name. Reads run on a connection of their own, in one transaction.

-- name: figures
SELECT name, value FROM total;
-- name: cancelling
SELECT count(*) FROM request WHERE state = 2 AND external = 0 AND cancelling = 1;
-- name: routes
SELECT name FROM route ORDER BY name;
-- name: last_attempt
SELECT max(
    coalesce((SELECT max(id) FROM attempt), 0), coalesce((SELECT value FROM total WHERE name = 'log_watermark'), 0)
);
-- name: passages
SELECT id, data FROM passage ORDER BY id;
-- name: conversations
SELECT c.id, c.name, c.created_at, c.active_at, c.turns, c.head, p.name
FROM conversation c LEFT JOIN conversation p ON p.id = c.forked_from ORDER BY c.id;
-- name: agents
SELECT agent FROM agent_conversation WHERE conversation = ? ORDER BY id;
-- name: aliases
SELECT name FROM alias WHERE conversation = ?;
-- name: forks
SELECT c.name, f.from_name, f.to_name, f.request_id, f.at, f.kind
FROM fork f JOIN conversation c ON c.id = f.child ORDER BY f.id;
-- name: members
SELECT r.external, r.key, r.request_id, c.name, r.state, r.place, r.priority, r.rank, r.route, r.hold, r.enqueued_at, r.due,
    r.expires, r.attempt, r.interruptions, r.interrupted_by, r.fence, r.since, r.term, r.provider, r.started_at,
    r.finished_at, r.error, r.message, r.cancelling, r.last_attempt, r.chain, b.reminders, b.model, b.agent, b.requeued_from,
    b.data, b.passage, b.place, b.reminded_place, r.question
FROM request r JOIN conversation c ON c.id = r.conversation JOIN body b ON b.request = r.key ORDER BY r.key;
-- name: attempt
SELECT earlier, id, previous, number, provider, outcome, started_at, finished_at, first_token, model, asked, mcp, stop_reason,
    provider_session, last_message, fork, error, message, input_tokens, output_tokens, cache_read, cache_write, reasoning,
    cost, text, content, raw
FROM attempt WHERE id = ?;
-- name: spare
SELECT a.request, c.name, a.agent, b.data, b.reminders, b.passage, b.place, b.reminded_place, a.id, a.previous, a.number, a.provider, a.outcome, a.started_at, a.finished_at,
    a.first_token, a.model, a.asked, a.mcp, a.stop_reason, a.provider_session, a.last_message, a.fork, a.error, a.message,
    a.input_tokens, a.output_tokens, a.cache_read, a.cache_write, a.reasoning, a.cost, a.text, a.content, a.raw
FROM attempt a JOIN conversation c ON c.id = a.conversation
    LEFT JOIN body b ON b.request = a.request AND a.outcome = 'completed'
WHERE NOT EXISTS (SELECT 1 FROM request r WHERE r.key = a.request) ORDER BY a.id;
-- name: saved_chains
SELECT c.name, c.created_at, c.started_at, c.max_depth, c.token_budget, c.time_window, c.used, c.estimated, c.closed,
    c.tripped, c.guard_messages, c.resets, c.reset_key, c.deepest,
    (SELECT coalesce(sum(m.estimate), 0) FROM member m JOIN request r ON r.key = m.request
     WHERE m.chain = c.id AND r.state = 2)
FROM chain c ORDER BY c.id;
-- name: saved_member
SELECT c.name, m.parent, m.parent_key, m.depth, m.max_depth, m.token_budget, m.time_window, m.estimate, m.output_cap,
    m.guard, m.routing, m.carries, m.mark, m.result, m.block, m.tokens, m.estimated
FROM member m JOIN chain c ON c.id = m.chain WHERE m.request = ?;
-- name: saved_injections
SELECT name, chain, parent, parent_key, target, direct, trigger, state, created_at, finished_at, request_id, reason, text,
    child, passage, place, child_place
FROM injection ORDER BY id;

-- name: saved_records
SELECT name, value FROM provider_record ORDER BY name;
-- name: load_record
INSERT INTO provider_record (name, version, value) VALUES (?1, 1, ?2)
ON CONFLICT (name) DO UPDATE SET version = version + 1, value = ?2;

-- name: anything
SELECT (SELECT count(*) FROM (SELECT 1 FROM request LIMIT 1000)),
    (SELECT count(*) FROM (SELECT 1 FROM conversation LIMIT 1000)),
    EXISTS (SELECT 1 FROM attempt);
-- name: conversation
SELECT id FROM conversation WHERE name = ?;
-- name: add_conversation
INSERT INTO conversation (name, created_at, active_at, looked_at, turns, head, forked_from)
VALUES (?1, ?2, ?3, ?3, ?4, ?5, ?6) RETURNING id;
-- name: was_active
UPDATE conversation SET active_at = ?2 WHERE id = ?1 AND active_at < ?2;
-- name: add_member
INSERT INTO request (
    external, key, request_id, conversation, state, place, ready, priority, rank, route, hold, enqueued_at, due, expires,
    attempt, interruptions, interrupted_by, fence, since, deadline, term, provider, started_at, finished_at, error, message,
    last_attempt, question, asks, cancelling
) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 0);
-- name: load_chain
INSERT INTO chain (
    name, created_at, started_at, max_depth, token_budget, time_window, used, estimated, closed, tripped, guard_messages,
    resets, reset_key, deepest
) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING id;
-- name: load_member
INSERT INTO member (
    request, chain, parent, parent_key, depth, max_depth, token_budget, time_window, estimate, output_cap, guard, routing,
    carries, mark, result, block, tokens, estimated
) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?);
-- name: add_body
INSERT INTO body (request, model, agent, requeued_from, data, reminders, passage, place, reminded_place)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?);
-- name: add_passage
INSERT INTO passage (id, data) VALUES (?, ?);
-- name: drop_spare_passages
DELETE FROM passage WHERE id NOT IN (SELECT passage FROM body WHERE passage IS NOT NULL)
    AND id NOT IN (SELECT passage FROM injection WHERE passage IS NOT NULL);
-- name: lines
SELECT DISTINCT conversation FROM request WHERE place = 0;

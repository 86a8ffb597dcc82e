-- Statements of budgets, by name. A name's text goes up to the next name.

-- name: budget_use
SELECT calls, tokens, nanos, held_calls, held_tokens, held_nanos, told, told_of FROM budget_use
WHERE name = ? AND subject = ? AND start = ?;
-- name: put_budget_use
INSERT INTO budget_use (name, subject, start, calls, tokens, nanos, held_calls, held_tokens, held_nanos, told, told_of)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (name, subject, start) DO UPDATE SET calls = excluded.calls, tokens = excluded.tokens, nanos = excluded.nanos,
    held_calls = excluded.held_calls, held_tokens = excluded.held_tokens, held_nanos = excluded.held_nanos,
    told = excluded.told, told_of = excluded.told_of;
-- name: budget_uses
SELECT subject, start, calls, tokens, nanos, held_calls, held_tokens, held_nanos, told, told_of FROM budget_use
WHERE name = ?1 AND start >= ?2 ORDER BY subject, start;
-- name: drop_budget_uses
DELETE FROM budget_use WHERE start <= ?1 AND held_calls = 0 AND rowid IN (
    SELECT rowid FROM budget_use WHERE start <= ?1 AND held_calls = 0 LIMIT ?2
) RETURNING 1;
-- name: budget_steps
SELECT data FROM budget_steps ORDER BY id;
-- name: add_budget_steps
INSERT INTO budget_steps (data) VALUES (?);
-- name: drop_budget_steps
DELETE FROM budget_steps;
-- name: add_demand
INSERT INTO demand (request, asks, hold) VALUES (?, ?, ?);
-- name: set_hold
INSERT INTO demand (request, asks, hold) VALUES (?1, ?2, ?3) ON CONFLICT (request) DO UPDATE SET hold = excluded.hold;
-- name: demand
SELECT asks FROM demand WHERE request = ?;
-- name: hold
SELECT hold FROM demand WHERE request = ?;
-- name: drop_hold
UPDATE demand SET hold = NULL WHERE request = ?;
-- name: drop_demand
DELETE FROM demand WHERE request = ? RETURNING 1;
-- name: context_tokens
SELECT coalesce(input_tokens, 0) + coalesce(cache_read, 0) + coalesce(cache_write, 0) + coalesce(output_tokens, 0)
FROM attempt WHERE id = ?;
-- name: over_budget
UPDATE request SET ready = 2, budget = ?2, budget_end = ?3 WHERE key = ?1;
-- name: any_over_budget
SELECT 1 FROM request WHERE ready = 2 AND budget IS NOT NULL LIMIT 1;
-- name: over_this_budget
SELECT r.key, d.asks FROM (
    SELECT key, rank FROM request WHERE ready = 2 AND budget IS NOT NULL AND budget = ?1 ORDER BY rank, key LIMIT ?2
) r LEFT JOIN demand d ON d.request = r.key ORDER BY r.rank, r.key;
-- name: bring_back_ended
UPDATE request SET ready = 1, budget = NULL, budget_end = NULL WHERE key IN (
    SELECT key FROM request WHERE ready = 2 AND budget IS NOT NULL AND budget_end <= ?1 ORDER BY budget_end LIMIT ?2
) RETURNING 1;
-- name: bring_back_of
UPDATE request SET ready = 1, budget = NULL, budget_end = NULL WHERE key IN (
    SELECT key FROM request WHERE ready = 2 AND budget IS NOT NULL AND budget >= ?1 AND budget < ?2
    ORDER BY budget, rank, key LIMIT ?3
) RETURNING 1;
-- name: next_budget_end
SELECT min(budget_end) FROM request WHERE ready = 2 AND budget IS NOT NULL;
-- name: waiting_for_budgets
SELECT budget, count(*), min(budget_end) FROM request WHERE ready = 2 AND budget IS NOT NULL GROUP BY budget LIMIT ?;

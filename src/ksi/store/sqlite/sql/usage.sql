-- The report on usage, by name. It walks the attempts once, from the newest backwards, and keeps of each what is summed
-- in a temporary table, together with its cost: the attempts themselves are wide, and the sums are many.

-- Rates are US dollars a token, for inputs larger than `above` and not larger than `upto`; '' stands for no model. A slice
-- is a PRICE_SLICE since 1970.
-- name: make_rates
CREATE TEMP TABLE rate (
    provider   TEXT NOT NULL,
    model      TEXT NOT NULL,
    asked      TEXT NOT NULL,
    slice      INTEGER NOT NULL,
    above      INTEGER NOT NULL,
    upto       INTEGER NOT NULL,
    input      REAL NOT NULL,
    output     REAL NOT NULL,
    cache_read REAL NOT NULL,
    cache_write REAL NOT NULL,
    reasoning  REAL NOT NULL,
    call       REAL NOT NULL,
    PRIMARY KEY (provider, model, asked, slice, above)
) WITHOUT ROWID;
-- `first` is a completed first turn, `alone` the only attempt of its request.
-- name: make_part
CREATE TEMP TABLE part (
    request      INTEGER NOT NULL,
    number       INTEGER NOT NULL,
    conversation INTEGER NOT NULL,
    agent        TEXT,
    model        TEXT,
    provider     TEXT NOT NULL,
    bucket       INTEGER,
    known        INTEGER NOT NULL,
    fenced       INTEGER NOT NULL,
    interrupted  INTEGER NOT NULL,
    mcp          INTEGER NOT NULL,
    first        INTEGER NOT NULL,
    alone        INTEGER NOT NULL,
    input        INTEGER,
    output       INTEGER,
    cache_read   INTEGER,
    cache_write  INTEGER,
    reasoning    INTEGER,
    cost         REAL,
    saved        REAL
);
-- name: drop_rates
DROP TABLE IF EXISTS temp.rate;
-- name: drop_part
DROP TABLE IF EXISTS temp.part;

-- name: conversation
SELECT coalesce(
    (SELECT id FROM conversation WHERE name = ?1), (SELECT conversation FROM alias WHERE name = ?1), -1
);
-- name: chain
SELECT coalesce((SELECT id FROM chain WHERE name = ?1), -1);
-- name: ends
SELECT coalesce(min(id), 0), coalesce(max(id), 0) FROM (
    SELECT (SELECT min(id) FROM attempt) AS id UNION ALL SELECT (SELECT max(id) FROM attempt)
);
-- name: kinds
SELECT DISTINCT provider, model, asked, finished_at / ?5 FROM attempt
WHERE id > ?1 AND id <= ?2 AND finished_at > ?3 AND finished_at <= ?4 AND input_tokens IS NOT NULL;
-- name: newest_of
SELECT max(finished_at) FROM attempt WHERE id > ?1 AND id <= ?2;
-- name: add_rate
INSERT OR IGNORE INTO temp.rate VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?);
-- name: take_part
INSERT INTO temp.part
SELECT a.request, a.number, a.conversation, a.agent, a.asked, a.provider, a.finished_at / ?6 * ?6,
    a.input_tokens IS NOT NULL, a.outcome = 'fenced', a.outcome = 'interrupted', a.mcp,
    a.previous IS NULL AND a.outcome = 'completed', a.number = 1 AND a.outcome = 'completed',
    a.input_tokens, a.output_tokens, a.cache_read, a.cache_write, a.reasoning,
    coalesce(
        a.cost,
        r.call + a.input_tokens * r.input + (a.output_tokens - a.reasoning) * r.output + a.reasoning * r.reasoning
            + a.cache_read * r.cache_read + a.cache_write * r.cache_write
    ),
    CASE a.cache_read WHEN 0 THEN 0.0 ELSE a.cache_read * (r.input - r.cache_read) END
FROM attempt a LEFT JOIN temp.rate r
    ON r.provider = a.provider AND r.model = coalesce(a.model, '') AND r.asked = coalesce(a.asked, '')
    AND r.slice = a.finished_at / ?5
    AND a.input_tokens + a.cache_read + a.cache_write > r.above
    AND a.input_tokens + a.cache_read + a.cache_write <= r.upto
WHERE a.id > ?1 AND a.id <= ?2 AND a.finished_at > ?3 AND a.finished_at <= ?4
    AND (?7 IS NULL OR a.agent = ?7) AND (?9 IS NULL OR a.asked = ?8 OR a.model = ?9)
    AND (?10 IS NULL OR a.provider = ?10) AND (?11 IS NULL OR a.conversation = ?11)
    AND (?12 IS NULL OR a.request IN (SELECT m.request FROM member m WHERE m.chain = ?12));
-- name: take_place_of_interruptions
DELETE FROM temp.part
WHERE interrupted AND (request, number) IN (SELECT request, number FROM temp.part WHERE fenced AND known);

-- {key} and {by} are what a group is named and told apart by, {where} which part is summed: the code puts them in.
-- name: sums
SELECT {key} AS key, count(*), sum(alone) + count(DISTINCT iif(alone, NULL, request)), sum(NOT known), sum(fenced),
    sum(known AND cost IS NULL), coalesce(sum(input), 0), coalesce(sum(output), 0), coalesce(sum(cache_read), 0),
    coalesce(sum(cache_write), 0), coalesce(sum(reasoning), 0), sum(cost), sum(saved),
    coalesce(sum(input), 0) + coalesce(sum(output), 0) AS tokens
FROM temp.part p WHERE {where} GROUP BY {by};
-- name: largest
WITH found AS ({sums})
SELECT * FROM found WHERE ?1 IS NULL OR tokens < ?1 OR (tokens = ?1 AND coalesce(key, '') > ?2)
ORDER BY tokens DESC, coalesce(key, '') LIMIT ?3;
-- name: mcp_uses
SELECT provider, model, count(*), sum(known) FROM temp.part WHERE mcp
GROUP BY provider, model ORDER BY sum(known) DESC, provider, coalesce(model, '') LIMIT ?;
-- name: first_turns
WITH turn AS (
    SELECT provider, model, mcp, input + cache_read + cache_write AS size,
        row_number() OVER (PARTITION BY provider, model, mcp ORDER BY input + cache_read + cache_write) AS place,
        count(*) OVER (PARTITION BY provider, model, mcp) AS turns
    FROM temp.part p
    WHERE first AND known AND EXISTS (
        SELECT 1 FROM (SELECT DISTINCT provider, model FROM temp.part WHERE mcp) w
        WHERE w.provider = p.provider AND w.model IS p.model
    )
)
SELECT provider, model, mcp, turns, avg(size) FROM turn WHERE place IN ((turns + 1) / 2, turns / 2 + 1)
GROUP BY provider, model, mcp ORDER BY provider, model, mcp;

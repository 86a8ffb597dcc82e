-- The layout of a KSI database. Times are microseconds; `deadline` is monotonic time, all others wall time.
-- `request` is the hot table: narrow rows, integer keys, and partial indexes that hold only what is in play.
-- `body` and `attempt` are written once. What chains need stands beside them: a request without one has no row there.

CREATE TABLE total (
    name  TEXT PRIMARY KEY,
    value INTEGER NOT NULL
) WITHOUT ROWID;

CREATE TABLE route (
    name TEXT PRIMARY KEY                   -- each one that was ever enqueued
) WITHOUT ROWID;

CREATE TABLE conversation (
    id          INTEGER PRIMARY KEY,
    name        TEXT NOT NULL UNIQUE,
    created_at  INTEGER NOT NULL,
    active_at   INTEGER NOT NULL,
    turns       INTEGER NOT NULL DEFAULT 0,
    head        INTEGER,                    -- attempt.id of the last good turn
    forked_from INTEGER,                    -- conversation.id
    reminders   INTEGER NOT NULL DEFAULT 0, -- deliveries that wait for its next prompt
    -- `active_at` as it was when the pruner last looked: an index on it need not be written at each turn.
    looked_at   INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX conversation_looked_at ON conversation (looked_at);
-- A clock that was set back.
CREATE TRIGGER conversation_clock AFTER UPDATE OF active_at ON conversation WHEN new.active_at < new.looked_at
BEGIN
    UPDATE conversation SET looked_at = new.active_at WHERE id = new.id;
END;

CREATE TABLE alias (
    name         TEXT PRIMARY KEY,          -- a provider session that means this conversation
    conversation INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX aliases_of ON alias (conversation);

CREATE TABLE agent_conversation (
    id           INTEGER PRIMARY KEY,       -- the order in which agents came to a conversation
    agent        TEXT NOT NULL,
    conversation INTEGER NOT NULL,
    UNIQUE (agent, conversation)
);
CREATE INDEX agents_of ON agent_conversation (conversation);

CREATE TABLE fork (
    id         INTEGER PRIMARY KEY,
    parent     INTEGER NOT NULL,            -- conversation.id; where a provider forked, of both sides the same
    child      INTEGER NOT NULL,
    from_name  TEXT NOT NULL,
    to_name    TEXT NOT NULL,
    request_id TEXT NOT NULL,
    at         INTEGER NOT NULL,
    kind       TEXT NOT NULL
);
CREATE INDEX fork_parent ON fork (parent);
CREATE INDEX fork_child ON fork (child);

CREATE TABLE request (
    key            INTEGER PRIMARY KEY,     -- grows with arrival
    request_id     TEXT NOT NULL UNIQUE,
    conversation   INTEGER NOT NULL,
    state          INTEGER NOT NULL,        -- see ksi.store.sqlite.rows.STATE_CODES
    place          INTEGER,                 -- 0 in the line, 1 holds the conversation, 2 delayed beside the line, NULL ended
    ready          INTEGER NOT NULL,        -- 1 can run, 2 could run and was set aside: it is paused, or waits for `budget`
    external       INTEGER NOT NULL,
    priority       INTEGER NOT NULL,
    rank           INTEGER NOT NULL,
    hold           INTEGER NOT NULL,        -- keeps its place while it waits for a retry
    route          TEXT NOT NULL,
    provider       TEXT,
    attempt        INTEGER NOT NULL,        -- attempts begun
    interruptions  INTEGER NOT NULL,
    fence          INTEGER,
    token          INTEGER,
    enqueued_at    INTEGER NOT NULL,
    due            INTEGER,                 -- of a delayed request; of an external lock, its end in wall time for the eye
    expires        INTEGER,
    deadline       INTEGER,
    term           INTEGER,                 -- how long `deadline` is away when it is set
    since          INTEGER,                 -- when it took the conversation
    started_at     INTEGER,
    finished_at    INTEGER,
    last_attempt   INTEGER,                 -- attempt.id; `attempt.earlier` leads further back
    cancelling     INTEGER NOT NULL,
    interrupted_by TEXT,
    error          TEXT,
    message        TEXT,
    chain          INTEGER,                 -- chain.id
    reminded       INTEGER NOT NULL DEFAULT 0,  -- deliveries in its prompt, while it runs
    question       TEXT,                    -- what a person is asked, with the answer, as JSON
    asks           INTEGER NOT NULL DEFAULT 0,  -- 1: the question is open
    budget         TEXT,                    -- of one that waits for a budget: its name, and whom it counts for, on two lines
    budget_end     INTEGER,                 -- the end of that budget's window
    tag            INTEGER NOT NULL DEFAULT 0,  -- its place in its priority, see ksi.store.rules.fairness
    flow           TEXT                     -- whom that counts for: an agent, or what stands for one
);
-- The lock is in the schema: a second holder of a conversation cannot be written.
CREATE UNIQUE INDEX holder ON request (conversation) WHERE place = 1;
CREATE INDEX line ON request (conversation, rank, key) WHERE place = 0;
CREATE INDEX beside ON request (conversation) WHERE place = 2;
CREATE INDEX ready ON request (route, priority, tag, rank, key) WHERE ready = 1;
CREATE INDEX aside ON request (route, rank, key) WHERE ready = 2;
CREATE INDEX over_budget ON request (budget, rank, key) WHERE ready = 2 AND budget IS NOT NULL;
CREATE INDEX budget_ends ON request (budget_end) WHERE ready = 2 AND budget IS NOT NULL;
CREATE INDEX running ON request (provider) WHERE state = 2 AND external = 0;
CREATE INDEX delayed ON request (due) WHERE state IN (0, 3, 4);
CREATE INDEX expiring ON request (expires) WHERE expires IS NOT NULL AND state IN (0, 1);
CREATE INDEX deadline ON request (deadline) WHERE deadline IS NOT NULL;
CREATE INDEX finished ON request (finished_at) WHERE finished_at IS NOT NULL;
CREATE INDEX failed ON request (finished_at) WHERE state = 6;
CREATE INDEX asking ON request (key) WHERE asks = 1;

CREATE TABLE body (
    request       INTEGER PRIMARY KEY,      -- request.key; stays as long as a turn needs it
    model         TEXT,
    agent         TEXT,
    requeued_from TEXT,
    data          BLOB NOT NULL,            -- the canonical request; an external lock's metadata
    reminders     TEXT,                     -- of a turn: what went before its prompt, as a JSON list
    passage        INTEGER,                 -- passage.id, of what is cut out of the next two
    place          INTEGER,                 -- where it was cut out of `data`, in bytes
    reminded_place INTEGER                  -- where it was cut out of `reminders`, in characters
);

CREATE TABLE attempt (
    id               INTEGER PRIMARY KEY,   -- grows with the commits
    request          INTEGER NOT NULL,
    earlier          INTEGER,               -- the same request's attempt before this one
    previous         INTEGER,               -- the conversation's turn before this one, where this is a turn
    conversation     INTEGER NOT NULL,
    agent            TEXT,                  -- the request's, kept for the account of usage
    number           INTEGER NOT NULL,
    provider         TEXT NOT NULL,
    outcome          TEXT NOT NULL,
    started_at       INTEGER NOT NULL,
    finished_at      INTEGER NOT NULL,
    first_token      INTEGER,
    model            TEXT,
    asked            TEXT,                  -- the full name of the model that was asked for
    mcp              INTEGER NOT NULL,      -- 1 with MCP servers
    stop_reason      TEXT,
    provider_session TEXT,
    last_message     TEXT,
    fork             TEXT,
    error            TEXT,
    message          TEXT,
    input_tokens     INTEGER,               -- NULL: no report came
    output_tokens    INTEGER,
    cache_read       INTEGER,
    cache_write      INTEGER,
    reasoning        INTEGER,
    cost             REAL,
    text             TEXT,
    raw              BLOB,
    content          TEXT                   -- the blocks of an answer that is more than its text, as a JSON list
);
CREATE INDEX spare_attempt ON attempt (finished_at) WHERE outcome <> 'completed';

CREATE TABLE chain (
    id             INTEGER PRIMARY KEY,
    name           TEXT NOT NULL UNIQUE,    -- its root's request_id
    created_at     INTEGER NOT NULL,
    started_at     INTEGER NOT NULL,        -- its time begins here: with its root, or at the last reset
    max_depth      INTEGER NOT NULL,        -- this and the next two: its root's limits
    token_budget   INTEGER NOT NULL,
    time_window    INTEGER NOT NULL,
    used           INTEGER NOT NULL,        -- tokens since the last reset
    estimated      INTEGER NOT NULL,        -- of `used`
    reserved       INTEGER NOT NULL DEFAULT 0,
    members        INTEGER NOT NULL DEFAULT 0,
    unfinished     INTEGER NOT NULL DEFAULT 0,
    deepest        INTEGER NOT NULL DEFAULT 0,
    closed         INTEGER NOT NULL DEFAULT 0,
    tripped        TEXT,                    -- a Block as JSON
    guard_messages INTEGER NOT NULL DEFAULT 0,
    resets         INTEGER NOT NULL DEFAULT 0,
    reset_key      INTEGER NOT NULL DEFAULT 0   -- members up to this key came before the last reset
);

CREATE TABLE member (
    request      INTEGER PRIMARY KEY,       -- request.key
    chain        INTEGER NOT NULL,
    parent       TEXT,                      -- a request_id
    parent_key   INTEGER,
    depth        INTEGER NOT NULL,
    max_depth    INTEGER NOT NULL,          -- this and the next two: the minimum over itself and its ancestors
    token_budget INTEGER NOT NULL,
    time_window  INTEGER NOT NULL,
    estimate     INTEGER NOT NULL,          -- input tokens
    output_cap   INTEGER,                   -- NULL: it was in no chain when it came in
    guard        INTEGER NOT NULL,
    routing      INTEGER NOT NULL,          -- see ksi.store.admission.Routing
    reserved     INTEGER NOT NULL DEFAULT 0,
    tokens       INTEGER NOT NULL DEFAULT 0,
    estimated    INTEGER NOT NULL DEFAULT 0,    -- 1: some of `tokens` is an estimate
    carries      INTEGER NOT NULL DEFAULT 0,    -- 1: it carries the delivery of its own name
    mark         BLOB,
    result       BLOB,
    block        TEXT                       -- a Block as JSON
);
CREATE INDEX members_of ON member (chain, request);
CREATE INDEX unrouted ON member (request) WHERE routing = 2;

CREATE TABLE injection (
    id           INTEGER PRIMARY KEY,       -- grows with creation
    name         TEXT NOT NULL UNIQUE,
    chain        TEXT NOT NULL,             -- this and the next one by name: they may be gone before it
    parent       TEXT NOT NULL,
    parent_key   INTEGER NOT NULL,
    target       TEXT NOT NULL,
    direct       INTEGER NOT NULL,
    trigger      TEXT NOT NULL,
    state        INTEGER NOT NULL,          -- see ksi.store.sqlite.chain_rows.INJECTION_STATES
    created_at   INTEGER NOT NULL,
    finished_at  INTEGER,
    conversation INTEGER,                   -- of a reminder that waits: conversation.id
    carrier      INTEGER,                   -- of a reminder that was taken: request.key
    request_id   TEXT,                      -- who carries or carried it
    reason       TEXT,                      -- a Block as JSON
    text         TEXT NOT NULL,
    child        BLOB,                      -- a ChildRequest as MessagePack, of a direct one that is not delivered
    passage      INTEGER,                   -- passage.id, of what is cut out of the next two
    place        INTEGER,                   -- where it was cut out of `text`, in characters
    child_place  INTEGER                    -- where it was cut out of the child's body, in bytes
);
CREATE INDEX injections_in ON injection (state, id);
CREATE INDEX reminders_for ON injection (conversation, id) WHERE conversation IS NOT NULL;
CREATE INDEX reminders_in ON injection (carrier, id) WHERE state = 1;
CREATE INDEX injections_ended ON injection (finished_at) WHERE finished_at IS NOT NULL;

CREATE TABLE budget_use (
    name        TEXT NOT NULL,              -- a budget's
    subject     TEXT NOT NULL,              -- whom it counts for, as in agent:nightly
    start       INTEGER NOT NULL,           -- of its window
    calls       INTEGER NOT NULL,           -- this and the next two: used by what ended
    tokens      INTEGER NOT NULL,
    nanos       INTEGER NOT NULL,           -- nanodollars
    held_calls  INTEGER NOT NULL,           -- this and the next two: set aside for what runs
    held_tokens INTEGER NOT NULL,
    held_nanos  INTEGER NOT NULL,
    told        INTEGER NOT NULL,           -- bits, see ksi.budgets.rules
    told_of     INTEGER NOT NULL,           -- the limit for which that was told
    PRIMARY KEY (name, subject, start)
);

-- Claims and ends of calls since `budget_use` and `demand.hold` were last written.
CREATE TABLE budget_steps (
    id   INTEGER PRIMARY KEY,               -- in the order of the transactions
    data BLOB NOT NULL                      -- see ksi.store.sqlite.budget_figures
);

CREATE TABLE demand (
    request INTEGER PRIMARY KEY,            -- request.key, of one that budgets may bind; until its end
    asks    BLOB,                           -- what it may use at each provider, as MessagePack
    hold    BLOB                            -- what is set aside for it while it runs, likewise
);

CREATE TABLE provider_record (
    name    TEXT PRIMARY KEY,
    version INTEGER NOT NULL,               -- grows with each change
    value   BLOB NOT NULL                   -- see ksi.completion.pool.record
) WITHOUT ROWID;

CREATE TABLE passage (
    id   INTEGER PRIMARY KEY,
    data BLOB NOT NULL                      -- what deliveries and prompts have in common, as it stands in a JSON string
);
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

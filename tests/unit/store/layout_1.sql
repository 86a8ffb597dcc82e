-- The layout of a KSI database. Times are microseconds; `deadline` is monotonic time, all others wall time.
-- `request` is the hot table: narrow rows, integer keys, and partial indexes that hold only what is in play.
-- `body` and `attempt` are written once.

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
    forked_from INTEGER                     -- conversation.id
);
CREATE INDEX conversation_activity ON conversation (active_at);

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
    state          INTEGER NOT NULL,        -- see ksi.store.sqlite_rows.STATE_CODES
    place          INTEGER,                 -- 0 in the line, 1 holds the conversation, 2 delayed beside the line, NULL ended
    ready          INTEGER NOT NULL,
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
    message        TEXT
);
-- The lock is in the schema: a second holder of a conversation cannot be written.
CREATE UNIQUE INDEX holder ON request (conversation) WHERE place = 1;
CREATE INDEX line ON request (conversation, rank, key) WHERE place = 0;
CREATE INDEX beside ON request (conversation) WHERE place = 2;
CREATE INDEX ready ON request (route, rank, key) WHERE ready = 1;
CREATE INDEX running ON request (provider) WHERE state = 2 AND external = 0;
CREATE INDEX delayed ON request (due) WHERE state IN (0, 3, 4);
CREATE INDEX expiring ON request (expires) WHERE expires IS NOT NULL AND state IN (0, 1);
CREATE INDEX deadline ON request (deadline) WHERE deadline IS NOT NULL;
CREATE INDEX finished ON request (finished_at) WHERE finished_at IS NOT NULL;
CREATE INDEX failed ON request (finished_at) WHERE state = 6;

CREATE TABLE body (
    request       INTEGER PRIMARY KEY,      -- request.key; stays as long as a turn needs it
    model         TEXT,
    agent         TEXT,
    requeued_from TEXT,
    data          BLOB NOT NULL             -- the canonical request; an external lock's metadata
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
    raw              BLOB
);
CREATE INDEX spare_attempt ON attempt (finished_at) WHERE outcome <> 'completed';

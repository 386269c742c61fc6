-- Who sends for an account now. Every change below is made together with a check of this row.
CREATE TABLE sender_lease (
    chain BIGINT NOT NULL,
    account TEXT NOT NULL,
    holder TEXT NOT NULL,
    -- Rises with each holder: one that was overtaken no longer matches.
    fence BIGINT NOT NULL,
    expires_ms BIGINT NOT NULL,
    -- Hash of the chain's first block, as the first turn found it: another chain may have the same id.
    genesis TEXT,
    -- The lowest nonce never given away; NULL before the first turn.
    next_nonce BIGINT,
    PRIMARY KEY (chain, account)
);
-- What is to happen once.
CREATE TABLE sender_intent (
    id BIGINT NOT NULL PRIMARY KEY,
    chain BIGINT NOT NULL,
    account TEXT NOT NULL,
    intent_key TEXT NOT NULL,
    -- The call as JSON; never changes.
    content TEXT NOT NULL,
    -- queued, sent, final, elsewhere, refused
    state TEXT NOT NULL,
    -- The nonce that it was given last.
    nonce BIGINT,
    -- What it waits for, or why it failed.
    note TEXT,
    UNIQUE (chain, account, intent_key)
);
CREATE INDEX sender_intent_state ON sender_intent (chain, account, state, id);
-- A nonce that was given away: to an intent, or to a transfer of nothing that fills a gap.
CREATE TABLE sender_nonce (
    chain BIGINT NOT NULL,
    account TEXT NOT NULL,
    nonce BIGINT NOT NULL,
    intent BIGINT REFERENCES sender_intent (id),
    -- open, mined, final, lost (another transaction of the key has it, finally)
    state TEXT NOT NULL,
    -- Where mined or final: which transaction, in which block, and whether it succeeded (1) or reverted (0).
    hash TEXT,
    block BIGINT,
    block_hash TEXT,
    succeeded BIGINT,
    PRIMARY KEY (chain, account, nonce)
);
CREATE INDEX sender_nonce_state ON sender_nonce (chain, account, state, nonce);
-- Every transaction signed for a nonce, as the node gets it.
CREATE TABLE sender_transaction (
    chain BIGINT NOT NULL,
    account TEXT NOT NULL,
    nonce BIGINT NOT NULL,
    -- 0 for the first, one more for each that replaces it.
    replacement BIGINT NOT NULL,
    hash TEXT NOT NULL,
    raw BLOB NOT NULL,
    signed_ms BIGINT NOT NULL,
    PRIMARY KEY (chain, account, nonce, replacement)
);

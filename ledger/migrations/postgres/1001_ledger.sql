-- The ledger. docs/ledger.md says what a row's hash covers. Amounts are 16 bytes, the most significant first; times are
-- milliseconds since 1970. 'ledger_rows' and 'ledger_head' are the truth; everything else is derived from the rows.

CREATE TABLE ledger_rows (
    seq BIGINT NOT NULL PRIMARY KEY,
    at_ms BIGINT NOT NULL,
    idempotency TEXT COLLATE "C" NOT NULL UNIQUE,
    body TEXT NOT NULL,
    hash BYTEA NOT NULL
);

-- One row: the last row of the journal, and the last that sealed an epoch.
CREATE TABLE ledger_head (
    one BIGINT NOT NULL PRIMARY KEY CHECK (one = 1),
    seq BIGINT NOT NULL,
    hash BYTEA NOT NULL,
    epoch BIGINT NOT NULL,
    epoch_row BIGINT NOT NULL
);
INSERT INTO ledger_head (one, seq, hash, epoch, epoch_row) VALUES (1, 0, decode(repeat('00', 32), 'hex'), 0, 0);

CREATE TABLE ledger_balances (
    account TEXT COLLATE "C" NOT NULL,
    asset TEXT COLLATE "C" NOT NULL,
    credits BYTEA NOT NULL,
    debits BYTEA NOT NULL,
    PRIMARY KEY (account, asset)
);

-- Which rows move money of an account.
CREATE TABLE ledger_entries (
    account TEXT COLLATE "C" NOT NULL,
    seq BIGINT NOT NULL,
    PRIMARY KEY (account, seq)
);

-- What each application may spend in a day (NULL: what it has), has spent and reserved on 'day', and has open.
CREATE TABLE ledger_applications (
    application TEXT COLLATE "C" NOT NULL,
    asset TEXT COLLATE "C" NOT NULL,
    per_day BYTEA,
    day BIGINT NOT NULL,
    used BYTEA NOT NULL,
    opened BIGINT NOT NULL,
    PRIMARY KEY (application, asset)
);

-- Reservations that are neither posted nor void.
CREATE TABLE ledger_open (
    name TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    seq BIGINT NOT NULL,
    at_ms BIGINT NOT NULL
);
CREATE INDEX ledger_open_by_age ON ledger_open (at_ms);

-- Receipts whose contributors are not known.
CREATE TABLE ledger_held (
    receipt TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    asset TEXT COLLATE "C" NOT NULL,
    amount BYTEA NOT NULL,
    at_ms BIGINT NOT NULL
);
CREATE INDEX ledger_held_by_age ON ledger_held (at_ms);

-- The row that set what holds now. Splits hold for all assets and have an empty one.
CREATE TABLE ledger_terms (
    kind TEXT COLLATE "C" NOT NULL,
    target TEXT COLLATE "C" NOT NULL,
    asset TEXT COLLATE "C" NOT NULL,
    seq BIGINT NOT NULL,
    PRIMARY KEY (target, kind, asset)
);

CREATE TABLE ledger_addresses (
    account TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    address BYTEA NOT NULL
);

-- What each address was owed in all epochs up to one, where the epoch changed it.
CREATE TABLE ledger_leaves (
    address BYTEA NOT NULL,
    asset TEXT COLLATE "C" NOT NULL,
    epoch BIGINT NOT NULL,
    cumulative BYTEA NOT NULL,
    PRIMARY KEY (address, asset, epoch)
);

-- The sum of the leaves.
CREATE TABLE ledger_totals (
    asset TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    cumulative BYTEA NOT NULL
);

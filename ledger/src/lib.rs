//! Usage, fees, rewards and epochs: an append-only, hash-chained, double-entry log.
//!
//! This room knows integers and a database. It knows no engine, chain, key or model: what a request used, who is to be
//! paid and whose data shaped the answer come in as data. Everything is a row of one journal; balances and all other
//! tables follow from the rows, and [`Ledger::verify`] derives them again. docs/ledger.md has the format and an example
//! with numbers.
//!
//! Where to start: [`Ledger`] (`ledger.rs`) is the whole; `row.rs` says what a row is and what follows from it,
//! `queue.rs` writes what queues together, `write.rs` decides, `terms.rs` divides, `draft.rs` holds what is not written yet,
//! `tables.rs` has the SQL, `epoch.rs` seals and folds, `verify.rs` checks.

mod account;
mod config;
mod draft;
mod epoch;
mod error;
mod ledger;
mod queue;
mod read;
mod row;
mod tables;
mod terms;
mod verify;
mod write;

pub use account::{Account, Address, Amount, Asset};
pub use config::LedgerConfig;
pub use epoch::{Epoch, Evidence, Fold, Leaf, Receipts};
pub use error::LedgerError;
pub use ledger::{Clock, Ledger, Posted, Reservation, Settled, Swept};
pub use read::{Entry, Holding, Order};
pub use row::{Request, Usage, Version};
pub use terms::{Fee, Payees, Prices, Split, Target, Tokens, divide};
pub use verify::Verified;

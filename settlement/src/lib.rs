//! From a ledger's epochs to an EVM Layer-2: payout trees and what is published of them, transactions that are sent exactly
//! once, and a watcher that challenges wrong roots. The only room that speaks to a chain.
//!
//! Where to start: [`tree`] is what accounts are paid by, [`bundle`] what is published of an epoch.

pub mod bundle;
pub mod contracts;
mod error;
pub mod tree;

pub use error::SettlementError;

//! From a ledger's epochs to an EVM Layer-2: payout trees and what is published of them, transactions that are sent exactly
//! once, and a watcher that challenges wrong roots. The only room that speaks to a chain.
//!
//! Where to start: [`epochs`] is an epoch's way from the ledger to those it pays; [`tree`] is what they are paid by, [`bundle`] what
//! is published and [`bundles`] where, [`sender`] what gets transactions onto the chain.

pub mod bundle;
pub mod bundles;
pub mod chain;
pub mod claims;
pub mod contracts;
pub mod deploy;
pub mod dev;
pub mod epochs;
mod error;
pub mod fees;
pub mod keys;
pub mod outbox;
mod preflight;
mod rpc;
pub mod sender;
mod transaction;
pub mod tree;
mod turn;
pub mod watch;

pub use error::SettlementError;
pub use rpc::{RpcConfig, RpcError, RpcUrl};

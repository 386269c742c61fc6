//! The process that is killed: does the steps from a given one on, and says of each when it is done or refused.

use std::cell::Cell;
use std::env;
use std::path::{Path, PathBuf};

use alloy::primitives::{Address, U256};
use alloy::sol_types::SolCall as _;
use openlora_ledger::{Address as PayoutAddress, Ledger, LedgerError, Payees, Request, Tokens, Usage};
use openlora_settlement::SettlementError;
use openlora_settlement::bundle::Bundle;
use openlora_settlement::bundles::{Bundles, publish_missing};
use openlora_settlement::chain::At;
use openlora_settlement::claims::Claims;
use openlora_settlement::contracts::RewardSettlement;
use openlora_settlement::epochs::Contract;
use openlora_settlement::outbox::{Intent, IntentId, Status, UnixMs};
use openlora_settlement::sender::Sender;
use openlora_types::{Classify as _, Fault};
use serde_json::{Value, json};

use crate::anvil::{self, OTHER};
use crate::stage::{self, STUCK, WINDOW, address, asset};
use crate::steps::{Step, steps};

/// Set for this process: folder, port of the node, contract, seed, first step, round.
pub(crate) const CHILD: &str = "OPENLORA_TEST_CONSERVATION_CHILD";
/// What is printed before a step's number and what came of it.
pub(crate) const SAID: &str = "step ";
/// Steps of the ledger that are in flight together.
const TOGETHER: usize = 20;
/// When the clock of the first round begins. Each round is later than any lease of the one before.
const START_MS: i64 = 4_000_000_000_000;

#[tokio::test]
#[ignore = "the child of the test in main.rs"]
async fn child_that_settles() {
    let told = env::var(CHILD).expect("started by its parent");
    let [dir, port, contract, seed, from, round] = told.split(' ').collect::<Vec<_>>().try_into().expect("six words");
    let (dir, port) = (PathBuf::from(dir), port.parse().expect("a port"));
    let now_ms = START_MS + round.parse::<i64>().expect("a number") * 1_000_000_000;
    let mut desk = Desk::open(&dir, port, contract.parse().expect("an address"), now_ms).await;
    let (mut from, steps): (usize, _) = (from.parse().expect("a number"), steps(seed.parse().expect("a seed")));
    while from < steps.len() {
        let rest = &steps[from..];
        let together = rest.iter().take(TOGETHER).take_while(|step| step.is_written_together()).count().max(1);
        for (number, outcome) in (from..).zip(desk.run(&rest[..together]).await) {
            match outcome {
                Ok(()) => println!("{SAID}{number} done"),
                Err(refused) => println!("{SAID}{number} refused: {refused}"),
            }
        }
        from += together;
    }
}

/// What a step needs.
struct Desk {
    ledger: Ledger,
    contract: Contract,
    sender: Sender,
    bundles: Bundles,
    claims: Claims,
    port: u16,
    now_ms: Cell<i64>,
}

/// Why a step was refused, by those who may refuse.
type Refused = String;

fn refused_by_the_ledger(error: LedgerError) -> Refused {
    assert!(error.fault() == Fault::Client, "{error}");
    error.to_string()
}

fn refused(error: SettlementError) -> Refused {
    assert!(error.fault() == Fault::Client, "{error}");
    error.to_string()
}

impl Desk {
    async fn open(dir: &Path, port: u16, contract: Address, now_ms: i64) -> Self {
        let (ledger, contract) = (stage::ledger(dir).await, stage::contract(port, contract).await);
        Self {
            claims: Claims::new(contract.clone(), ledger.clone(), asset()),
            ledger,
            contract,
            sender: stage::sender(dir, stage::chain(port).await).await,
            bundles: Bundles::open("", &dir.join("bundles")).expect("a folder"),
            port,
            now_ms: Cell::new(now_ms),
        }
    }

    async fn run(&mut self, steps: &[Step]) -> Vec<Result<(), Refused>> {
        if !steps[0].is_written_together() {
            return vec![self.alone(&steps[0]).await];
        }
        // One task each, started in order on one thread: they queue for the writer in that order.
        let tasks = steps.iter().map(|step| {
            let (ledger, step) = (self.ledger.clone(), step.clone());
            tokio::spawn(async move { write(&ledger, step).await.map_err(refused_by_the_ledger) })
        });
        let mut outcomes = Vec::new();
        for task in tasks.collect::<Vec<_>>() {
            outcomes.push(task.await.expect("ended"));
        }
        outcomes
    }

    async fn alone(&mut self, step: &Step) -> Result<(), Refused> {
        match step {
            Step::Seal => self.ledger.seal().await.map(drop).map_err(refused_by_the_ledger),
            Step::Publish => {
                let (settles, asset) = (self.contract.settles(), asset());
                publish_missing(&self.ledger, settles, &asset, &self.bundles).await.map(drop).map_err(refused)
            }
            Step::Fund { key, amount } => {
                // By its key alone: a transfer that was made is not due again.
                let id = self.sender.submit(&self.contract.fund(*amount, key)).await.map_err(refused)?;
                self.settle(id).await;
                Ok(())
            }
            Step::Pass => {
                anvil::ask(self.port, "evm_increaseTime", json!([WINDOW]));
                self.mine(1);
                Ok(())
            }
            Step::Propose => self.propose().await,
            Step::Finalize => self.finalize().await,
            Step::Claim { addresses, back } => self.claim(addresses, *back).await,
            Step::ClaimByAnother { address } => self.claim_by_another(*address).await,
            Step::Note => self.claims.note(|_| {}).await.map_err(refused),
            other => unreachable!("{other:?} is written together with others"),
        }
    }

    async fn published(&self, epoch: u64) -> Result<Bundle, Refused> {
        let found = self.bundles.get(epoch).await.map_err(refused)?;
        found.ok_or_else(|| format!("epoch {epoch} is not published"))
    }

    async fn propose(&self) -> Result<(), Refused> {
        let state = self.contract.state(At::Latest).await.map_err(refused)?;
        let bundle = self.published(state.open.map_or(state.epoch + 1, |open| open.epoch)).await?;
        self.send(self.contract.propose(&bundle).await).await
    }

    async fn finalize(&self) -> Result<(), Refused> {
        let open = self.contract.state(At::Latest).await.map_err(refused)?.open.ok_or("nothing is proposed")?;
        let bundle = self.published(open.epoch).await?;
        let block: Value = anvil::ask(self.port, "eth_getBlockByNumber", json!(["latest", false]));
        let now = anvil::number(&block["timestamp"]);
        self.send(self.contract.finalize(&bundle, now).await).await
    }

    async fn claimable(&self, back: u64) -> Result<Bundle, Refused> {
        let last = self.contract.state(At::Latest).await.map_err(refused)?.epoch;
        match last.checked_sub(back) {
            Some(epoch) if epoch > 0 => self.published(epoch).await,
            _ => Err(format!("epoch {last} is the last final one")),
        }
    }

    async fn claim(&self, addresses: &[u8], back: u64) -> Result<(), Refused> {
        let bundle = self.claimable(back).await?;
        let addresses: Vec<Address> = addresses.iter().copied().map(address).collect();
        self.send(self.contract.claim(&bundle, &addresses).await).await
    }

    async fn claim_by_another(&self, number: u8) -> Result<(), Refused> {
        let (bundle, account) = (self.claimable(0).await?, address(number));
        let claimed = self.contract.claimed(account, At::Latest).await.map_err(refused)?;
        let Some(proof) = bundle.tree().proof(account).filter(|proof| claimed < U256::from(proof.cumulative)) else {
            return Ok(());
        };
        let entry = RewardSettlement::Claim {
            epoch: bundle.manifest().epoch,
            account,
            cumulative: U256::from(proof.cumulative),
            index: U256::from(proof.index),
            proof: proof.siblings,
        };
        let data = RewardSettlement::claimCall { entry }.abi_encode();
        let to = self.contract.settles().settlement;
        let call = json!({ "from": OTHER, "to": to, "data": alloy::hex::encode_prefixed(data), "gas": "0x40000" });
        anvil::ask(self.port, "eth_sendTransaction", json!([call]));
        self.mine(3);
        Ok(())
    }

    /// Sends what there is to send and sees it final; blocks have come either way, so that what is on the chain is final.
    async fn send(&self, intent: Result<Option<Intent>, SettlementError>) -> Result<(), Refused> {
        if let Some(intent) = intent.map_err(refused)? {
            let id = self.contract.submit(&self.sender, intent).await.map_err(refused)?;
            self.settle(id).await;
        }
        self.mine(3);
        Ok(())
    }

    async fn turn(&self, later_ms: i64) {
        self.now_ms.set(self.now_ms.get() + later_ms);
        self.sender.turn_at(UnixMs(self.now_ms.get())).await.expect("a turn");
    }

    /// Takes turns until the intent is final. Every second one is stuck at first: no block comes and it is replaced.
    async fn settle(&self, id: IntentId) {
        self.turn(1).await;
        if let Status::Broadcast { nonce, .. } = self.sender.status(id).await.expect("known")
            && nonce % 2 == 0
        {
            self.turn(STUCK.as_millis() as i64).await;
        }
        for _ in 0..30 {
            match self.sender.status(id).await.expect("known") {
                Status::Finalized { reverted: None, .. } => return,
                Status::Finalized { reverted: Some(why), .. } | Status::Refused { reason: why } => panic!("{why}"),
                _ => self.mine(1),
            }
            self.turn(1).await;
        }
        panic!("never final");
    }

    fn mine(&self, blocks: u64) {
        anvil::ask(self.port, "anvil_mine", json!([format!("{blocks:#x}")]));
    }
}

async fn write(ledger: &Ledger, step: Step) -> Result<(), LedgerError> {
    match step {
        Step::Deposit { key, application, amount } => {
            ledger.deposit(&key, &application, &asset(), amount).await.map(drop)
        }
        Step::Reserve { key, application, prompt, completion } => {
            let request = Request {
                application,
                asset: asset(),
                generation: Some("ab".repeat(32)),
                alias: Some("acme/cwe".into()),
                prompt_tokens: prompt,
                completion_tokens_max: completion,
            };
            ledger.reserve(&key, &request).await.map(drop)
        }
        Step::Post { key, prompt, cached, completion, owner, parents } => {
            let usage = Usage {
                request_id: key.clone(),
                receipt: Some(key.clone()),
                tokens: Tokens { prompt, cached, completion },
                payees: Payees { owner, base_owner: Some("smol".into()), parents },
            };
            ledger.post(&key, &usage).await.map(drop)
        }
        Step::Void { key } => ledger.void(&key).await.map(drop),
        Step::Attribute { receipt, shares, unattributed } => {
            ledger.attribute(&receipt, shares, unattributed).await.map(drop)
        }
        Step::Address { key, account, to } => {
            let account = account.parse().expect("an account");
            ledger.set_address(&key, &account, to.map(|to| PayoutAddress([to; 20]))).await.map(drop)
        }
        other => unreachable!("{other:?} is done alone"),
    }
}

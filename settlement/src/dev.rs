//! A chain of one's own: anvil, as an OP-stack chain.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use alloy::primitives::{Address, U256};
use serde_json::Value;

use crate::error::SettlementError;
use crate::rpc::{Rpc, RpcConfig, RpcUrl};

/// The id of chains that are nobody's but one's own.
pub const CHAIN_ID: u64 = 31_337;

/// A running anvil; stopped when dropped.
#[derive(Debug)]
pub struct Anvil {
    process: Child,
    port: u16,
}

impl Anvil {
    /// Starts `program` on this machine's loopback, at `port` or, where that is 0, at a free one: a block every second, final two
    /// blocks later.
    ///
    /// # Errors
    /// [`SettlementError::NoAnvil`] where it does not start.
    pub fn start(program: &Path, port: u16) -> Result<Self, SettlementError> {
        let failed = |reason: String| SettlementError::NoAnvil { program: program.display().to_string(), reason };
        let mut command = Command::new(program);
        command.args(["--optimism", "--slots-in-an-epoch", "1", "--block-time", "1", "--host", "127.0.0.1", "--port"]);
        command.arg(port.to_string()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut process = command.spawn().map_err(|error| failed(error.to_string()))?;
        let lines = process.stdout.take().map(|out| BufReader::new(out).lines());
        let mut anvil = Self { process, port };
        let mut lines = lines.ok_or_else(|| failed("it says nothing".to_owned()))?;
        let listening = |line: String| line.strip_prefix("Listening on 127.0.0.1:")?.parse().ok();
        let heard = lines.by_ref().map_while(Result::ok).find_map(listening);
        anvil.port = heard.ok_or_else(|| failed(format!("it ended; is port {port} taken?")))?;
        // What it says of every block is read, so that it never waits for a reader.
        std::thread::spawn(move || lines.for_each(drop));
        Ok(anvil)
    }

    /// Where it answers.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Gives an account wei from nowhere.
    ///
    /// # Errors
    /// The node's.
    pub async fn fund(&self, account: Address, wei: u128) -> Result<(), SettlementError> {
        let url = RpcUrl::parse("url", &self.url())?;
        let config = RpcConfig { timeout: Duration::from_secs(10), ..RpcConfig::default() };
        Rpc::new(&url, config)?.ask::<Value>("anvil_setBalance", (account, U256::from(wei))).await?;
        Ok(())
    }

    /// Whether it has ended by itself.
    ///
    /// # Errors
    /// The system's.
    pub fn has_ended(&mut self) -> std::io::Result<bool> {
        Ok(self.process.try_wait()?.is_some())
    }
}

impl Drop for Anvil {
    fn drop(&mut self) {
        // It may have ended by itself, as on Ctrl-C, which reaches all processes of a terminal.
        let _killed = self.process.kill();
        let _ended = self.process.wait();
    }
}

//! A local Ethereum node for one test.

use std::{
    env,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use alloy::primitives::{Address, B256, Bytes, U256, address, b256};
use serde_json::{Value, json};

/// anvil's first account, and its key, known to everybody.
pub(crate) const ACCOUNT: Address = address!("0xf39Fd6e51aad88F6F4ce6aB8827279cffFb92266");
pub(crate) const KEY: B256 = b256!("0xac0974bec39a17e36ba4a6b4d238ff944bacb478cbed5efcae784d7bf4f2ff80");
/// Its second account: somebody else.
pub(crate) const OTHER: Address = address!("0x70997970C51812dc3A010C7d01b50e0d17dc79C8");

/// How long anvil may take for an answer.
const TIMEOUT: Duration = Duration::from_secs(30);

pub(crate) struct Anvil {
    process: Child,
    pub(crate) port: u16,
}

impl Anvil {
    /// Blocks come when a test mines them, and are final two blocks later.
    pub(crate) fn start() -> Self {
        Self::start_with(&[])
    }

    pub(crate) fn start_with(arguments: &[&str]) -> Self {
        let home = env::var_os("OPENLORA_HOME").map(PathBuf::from).unwrap_or_else(|| {
            PathBuf::from(env::var_os("HOME").expect("HOME or OPENLORA_HOME")).join(".cache/openlora")
        });
        let program = home.join("anvil/1.7.1/anvil");
        assert!(program.exists(), "there is no {}; run scripts/fetch-anvil.sh", program.display());
        let mut command = Command::new(program);
        command.args(["--port", "0", "--optimism", "--slots-in-an-epoch", "1"]).args(arguments).stdout(Stdio::piped());
        let mut process = command.spawn().expect("anvil runs here");
        let mut lines = BufReader::new(process.stdout.take().expect("piped")).lines();
        let port = lines.by_ref().find_map(|line| line.ok()?.strip_prefix("Listening on 127.0.0.1:")?.parse().ok());
        std::thread::spawn(move || lines.for_each(drop));
        let anvil = Self { process, port: port.expect("anvil says where it listens") };
        anvil.ask("evm_setAutomine", json!([false]));
        anvil
    }

    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// A question that must be answered.
    pub(crate) fn ask(&self, method: &str, params: Value) -> Value {
        ask(self.port, method, params)
    }

    pub(crate) fn mine(&self, blocks: u64) {
        self.ask("anvil_mine", json!([format!("{blocks:#x}")]));
    }

    /// Nonces used by an account.
    pub(crate) fn nonce(&self, account: Address) -> u64 {
        number(&self.ask("eth_getTransactionCount", json!([account, "latest"])))
    }

    /// Transactions that wait for a block.
    pub(crate) fn pool(&self) -> Vec<B256> {
        let block = self.ask("eth_getBlockByNumber", json!(["pending", false]));
        serde_json::from_value(block["transactions"].clone()).expect("hashes")
    }

    /// Sends as a wallet that anvil holds the keys of would.
    pub(crate) fn send(&self, transaction: Value) -> B256 {
        serde_json::from_value(self.ask("eth_sendTransaction", json!([transaction]))).expect("a hash")
    }

    pub(crate) fn view(&self, to: Address, data: &Bytes) -> U256 {
        let call = json!({ "to": to, "data": data });
        serde_json::from_value(self.ask("eth_call", json!([call, "latest"]))).expect("a number")
    }
}

impl Drop for Anvil {
    fn drop(&mut self) {
        let _killed = self.process.kill();
        let _ended = self.process.wait();
    }
}

pub(crate) fn number(value: &Value) -> u64 {
    serde_json::from_value::<U256>(value.clone()).expect("a number").to()
}

/// A question that must be answered, to the node at `port`.
pub(crate) fn ask(port: u16, method: &str, params: Value) -> Value {
    ask_all(port, method, [params]).remove(0)
}

/// Questions that must all be answered, in one request; the answers in their order.
pub(crate) fn ask_all(port: u16, method: &str, params: impl IntoIterator<Item = Value>) -> Vec<Value> {
    let answers = try_all(port, method, params).into_iter();
    answers.map(|answer| answer.unwrap_or_else(|error| panic!("{method}: {error}"))).collect()
}

/// As [`ask_all`], with the errors of those that are refused.
pub(crate) fn try_all(port: u16, method: &str, params: impl IntoIterator<Item = Value>) -> Vec<Result<Value, Value>> {
    let question = |(id, params)| json!({ "jsonrpc": "2.0", "id": id, "method": method, "params": params });
    let questions: Vec<Value> = (0..).zip(params).map(question).collect::<Vec<Value>>();
    let body = serde_json::to_vec(&questions).expect("JSON");
    let mut answers: Vec<Value> = serde_json::from_slice(&post(port, &body)).expect("JSON");
    assert_eq!(answers.len(), questions.len(), "{method}");
    answers.sort_by_key(|answer| answer["id"].as_u64());
    let result = |mut answer: Value| {
        if answer["error"].is_null() { Ok(answer["result"].take()) } else { Err(answer["error"].take()) }
    };
    answers.into_iter().map(result).collect()
}

/// The body of the answer to a body.
pub(crate) fn post(port: u16, body: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("anvil listens");
    stream.set_read_timeout(Some(TIMEOUT)).expect("a socket");
    let head = format!(
        "POST / HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(&[head.as_bytes(), body].concat()).expect("sent");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("answered");
    let head = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n").expect("a head");
    answer.split_off(head + 4)
}

//! Processes killed at every point of a settlement, again and again, and processes that send at the same time.

use std::{
    env,
    os::unix::process::ExitStatusExt as _,
    path::Path,
    process::{Child, Command, Output, Stdio},
};

use openlora_database::kill;
use openlora_settlement::{
    outbox::{Status, UnixMs},
    sender::{Sender, SenderConfig},
};

use crate::{
    anvil::ACCOUNT,
    stage::{START, Stage, chain, count, database, signer, turn},
};

/// Set for the children of these tests: the folder of the outbox, the node, the contract, the first number to count, and
/// how far the child's clock is off, in milliseconds.
const CHILD: &str = "OPENLORA_TEST_SENDER_CHILD";
/// Numbers that each child counts.
const NUMBERS: u64 = 3;

#[tokio::test]
#[ignore = "the child of the tests below"]
async fn child_that_sends() {
    let told = env::var(CHILD).expect("started by its parent");
    let [dir, url, counter, first, skew] = told.split(' ').collect::<Vec<_>>().try_into().expect("five words");
    let counter = counter.parse().expect("an address");
    let (first, skew): (u64, i64) = (first.parse().expect("a number"), skew.parse().expect("a number"));
    let config = SenderConfig { stuck_after: std::time::Duration::from_millis(100), ..SenderConfig::default() };
    let sender = Sender::new(chain(url).await, signer(), database(Path::new(dir)).await, config);
    let mut ids = Vec::new();
    for number in first..first + NUMBERS {
        ids.push(sender.submit(&count(counter, number)).await.expect("kept"));
    }
    for step in 0..5_000 {
        // A clock that runs fast: leases run out while others work.
        sender.turn_at(UnixMs(START + skew + step * 20_000)).await.expect("a turn");
        let mut open = false;
        for id in &ids {
            match sender.status(*id).await.expect("known") {
                Status::Finalized { reverted: None, .. } => {}
                Status::Finalized { reverted: Some(why), .. } => panic!("{why}"),
                Status::Refused { reason } => panic!("{reason}"),
                _ => open = true,
            }
        }
        if !open {
            return;
        }
    }
    panic!("never final");
}

/// This program as the child that counts from `first` on.
fn child(stage: &Stage, first: u64, skew: i64, point: Option<&str>) -> Child {
    let told = format!("{} {} {} {first} {skew}", stage.dir.path().display(), stage.anvil.url(), stage.counter);
    let mut child = Command::new(env::current_exe().expect("this binary"));
    child.args(["--exact", "crash::child_that_sends", "--ignored", "--nocapture"]).env(CHILD, told);
    if let Some(point) = point {
        child.env(kill::AT, point);
    }
    child.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("runs")
}

/// Waits for children while blocks come, each in its time.
fn ended(stage: &Stage, mut children: Vec<Child>) -> Vec<Output> {
    while children.iter_mut().any(|child| child.try_wait().expect("a child").is_none()) {
        stage.anvil.mine(1);
    }
    children.into_iter().map(|child| child.wait_with_output().expect("ended")).collect()
}

/// Every number up to `numbers` once, and a nonce for each.
fn check(stage: &Stage, numbers: u64, what: &str) {
    for number in 1..=numbers {
        assert_eq!(stage.counted(number), 1, "{what}: {number}");
    }
    assert_eq!((stage.counted(0), stage.anvil.nonce(ACCOUNT)), (numbers, numbers), "{what}");
}

#[tokio::test]
async fn a_process_killed_at_any_point_leaves_one_effect_and_no_gap() {
    let points = [
        "before an intent is kept#2",
        "after an intent was kept",
        "before a nonce is given away",
        "before a nonce is given away#3",
        "after a nonce was given away",
        "after a nonce was given away#2",
        "between changes and commit#4",
        "between changes and commit#7",
        "between commit and answer#5",
        "between commit and answer#8",
        "before a broadcast",
        "before a broadcast#2",
        "after a broadcast",
        "after a broadcast#3",
        "before a replacement",
        "after a replacement",
        "before a nonce is final",
        "after a nonce is final",
        "after a nonce is final#2",
    ];
    let stage = Stage::new().await;
    for (round, point) in (0..).zip(points) {
        let first = round * NUMBERS + 1;
        // Where no blocks come, there are replacements.
        let dies = child(&stage, first, 1_000_000 * round as i64, Some(point));
        let dead = if point.contains("replacement") {
            dies.wait_with_output().expect("ended")
        } else {
            ended(&stage, vec![dies]).remove(0)
        };
        assert_eq!(dead.status.signal(), Some(9), "{point}: {}", String::from_utf8_lossy(&dead.stderr));
        let lives = ended(&stage, vec![child(&stage, first, 1_000_000 * round as i64 + 500_000, None)]).remove(0);
        assert!(lives.status.success(), "{point}: {}", String::from_utf8_lossy(&lives.stdout));
        check(&stage, first + NUMBERS - 1, point);
    }
}

#[tokio::test]
async fn processes_that_send_at_once_with_clocks_apart_reuse_no_nonce_and_lose_none() {
    let stage = Stage::new().await;
    let skews = [0, 30_000, -45_000, 90_000];
    let children = (0..).zip(skews).map(|(i, skew)| child(&stage, i * NUMBERS + 1, skew, None)).collect();
    for end in ended(&stage, children) {
        assert!(end.status.success(), "{}", String::from_utf8_lossy(&end.stdout));
    }
    check(&stage, skews.len() as u64 * NUMBERS, "at once");
    // Nothing is left to do.
    let sender = stage.sender().await;
    let rest = turn(&sender, 1_000_000_000).await;
    assert_eq!((rest.signed, rest.broadcast, rest.gaps_filled, rest.finalized), (0, 0, 0, 0), "{rest:?}");
}

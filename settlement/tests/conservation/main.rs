//! Ledger and chain together, in processes that are killed again and again: whatever a process died at, the next one goes on, and
//! in the end every unit, epoch and nonce is accounted for. `OPENLORA_TEST_SEED` chooses other steps and other deaths.

#[path = "../sender/anvil.rs"]
#[expect(dead_code, reason = "shared with the sender's tests, which use all of it")]
mod anvil;
mod books;
mod check;
mod child;
mod stage;
mod steps;

use std::collections::BTreeMap;
use std::env;
use std::io::{BufRead as _, BufReader};
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, Stdio};

use openlora_database::kill;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use tempfile::TempDir;

use anvil::{ACCOUNT, Anvil};
use books::Books;
use child::{CHILD, SAID};
use steps::steps;

/// Where processes die, and how often at most they have been there by then.
const POINTS: [(&str, u32); 22] = [
    ("after the row", 12),
    ("before an intent is kept", 2),
    ("before a nonce is given away", 2),
    ("after the balances", 12),
    ("after a nonce was given away", 2),
    ("before a broadcast", 2),
    ("after a broadcast", 2),
    ("before a replacement", 1),
    ("after an intent was kept", 2),
    ("before the commit", 12),
    ("between payouts and seal", 1),
    ("before a bundle is put", 1),
    (ANY_INSTANT, 200),
    ("after a bundle was put", 1),
    ("after a replacement", 1),
    ("between changes and commit", 40),
    ("between commit and answer", 40),
    ("before a receipt is kept", 2),
    ("after a receipt was kept", 2),
    ("before a nonce is final", 2),
    (ANY_INSTANT, 200),
    ("after a nonce is final", 2),
];
/// No point of the program's: killed from outside once so many steps were heard of.
const ANY_INSTANT: &str = "any instant";

/// How a process ended.
struct Ended {
    /// What came of its steps, in their order.
    outcomes: Vec<(usize, bool, String)>,
    killed: bool,
    errors: String,
}

/// The rounds of one seed.
struct Rounds {
    anvil: Anvil,
    dir: TempDir,
    told: String,
}

impl Rounds {
    /// Runs this program as the child that goes on at step `from`, until it is killed at `point` for the `times`-th time.
    fn run(&self, from: usize, round: usize, (point, times): (&str, u32)) -> Ended {
        let mut command = Command::new(env::current_exe().expect("this binary"));
        command.args(["--exact", "child::child_that_settles", "--ignored", "--nocapture"]);
        command.env(CHILD, format!("{} {from} {round}", self.told)).stdout(Stdio::piped()).stderr(Stdio::piped());
        if point != ANY_INSTANT {
            command.env(kill::AT, format!("{point}#{times}"));
        }
        let mut child = command.spawn().expect("runs");
        let mut errors = child.stderr.take().expect("piped");
        let errors = std::thread::spawn(move || std::io::read_to_string(&mut errors));
        let mut outcomes = Vec::new();
        for line in BufReader::new(child.stdout.take().expect("piped")).lines() {
            let line = line.expect("text");
            let Some((number, outcome)) = line.strip_prefix(SAID).and_then(|said| said.split_once(' ')) else {
                continue;
            };
            outcomes.push((number.parse().expect("a number"), outcome == "done", outcome.to_owned()));
            if point == ANY_INSTANT && outcomes.len() == times as usize {
                child.kill().expect("killed");
            }
        }
        let status = child.wait().expect("ended");
        let errors = errors.join().expect("read").expect("text");
        let killed = status.signal() == Some(9);
        assert!(killed || status.success(), "{point}#{times}: {status}: {errors}");
        Ended { outcomes, killed, errors }
    }
}

#[tokio::test]
async fn every_unit_epoch_and_nonce_is_accounted_for_wherever_the_process_is_killed() {
    let seed = env::var("OPENLORA_TEST_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    println!("OPENLORA_TEST_SEED={seed}");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let steps = steps(seed);
    let (anvil, dir) = (Anvil::start(), TempDir::new().expect("a temporary folder"));
    let deployment = stage::set_up(&anvil, dir.path()).await;
    let mut books = Books::new(anvil.nonce(ACCOUNT));
    let told = format!("{} {} {} {seed}", dir.path().display(), anvil.port, deployment.settlement);
    let rounds = Rounds { anvil, dir, told };
    let (mut deaths, mut from, mut round) = (BTreeMap::new(), 0, 0);
    while from < steps.len() {
        let (point, most) = POINTS[round % POINTS.len()];
        let at = (point, rng.random_range(1..=most));
        let ended = rounds.run(from, round, at);
        for (number, done, said) in &ended.outcomes {
            let step = &steps[*number];
            assert_eq!(*number, from, "steps are done in order");
            let must = books.follow(step, u64::MAX).expect("never cut off");
            assert_eq!(*done, must, "seed {seed}, round {round}, step {number} {step:?}: {said}");
            from += 1;
        }
        if ended.killed {
            *deaths.entry(point).or_insert(0) += 1;
        } else {
            assert_eq!(from, steps.len(), "a child that lives does everything: {}", ended.errors);
        }
        let what = format!("seed {seed}, round {round}, {at:?}, step {from}");
        books = check::after(&rounds.anvil, rounds.dir.path(), &deployment, books, &steps[from..], &what).await;
        round += 1;
    }
    println!("{round} rounds, {} rows, chain {:?}, deaths {deaths:?}", books.rows, books.chain);
    for (point, _) in POINTS {
        assert!(deaths.contains_key(point), "seed {seed}: nobody died {point}");
    }
    check::end(&rounds.anvil, rounds.dir.path(), &deployment, &books).await;
}

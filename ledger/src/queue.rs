//! The writer's thread: what is asked queues here, and what queues while one transaction commits shares the next.

use std::sync::Arc;

use openlora_database::Database;
use sqlx::AnyConnection;
use tokio::sync::{mpsc, oneshot};

use crate::{
    draft::Draft,
    error::LedgerError,
    row::{Operation, Written},
    write::Writer,
};

/// Something to write, and who waits for it.
pub(crate) struct Job {
    pub(crate) key: String,
    pub(crate) asked: Operation,
    pub(crate) at_ms: u64,
    pub(crate) answer: oneshot::Sender<Result<Written, LedgerError>>,
}

type Answers = Vec<Result<Written, LedgerError>>;

/// Writes what is queued in its order, at most `writes_max` in one transaction; all are told after its commit, the
/// refused too, since what they were refused for may come to nothing. Ends when the ledger is dropped and all is done.
pub(crate) fn write_all(db: &Arc<Database>, writer: &Arc<Writer>, mut queue: mpsc::Receiver<Job>) {
    // Without a runtime every caller is told that the ledger stopped.
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
    runtime.block_on(async {
        let mut jobs = Vec::new();
        while let Some(job) = queue.recv().await {
            jobs.push(job);
            let work = async |db: &mut AnyConnection| write_queued(db, writer, &mut jobs, &mut queue).await;
            let done = db.change("write to the ledger", work).await;
            let mut done = done.map(Vec::into_iter);
            for job in jobs.drain(..) {
                let answer = match &mut done {
                    Ok(answers) => answers.next().expect("one for each"),
                    Err(error) => Err(error.clone()),
                };
                // Whoever does not wait any more may ask again with the key.
                let _gone = job.answer.send(answer);
            }
        }
    });
}

/// Does `jobs` and those that queue meanwhile, which are added to them, and writes it all. Run again where another server
/// was faster.
///
/// # Errors
/// The database's, after which nothing is done.
async fn write_queued(
    db: &mut AnyConnection,
    writer: &Writer,
    jobs: &mut Vec<Job>,
    queue: &mut mpsc::Receiver<Job>,
) -> Result<Answers, LedgerError> {
    let mut draft = Draft::begin(db).await?;
    let mut answers = Answers::new();
    while answers.len() < jobs.len() {
        let new = &jobs[answers.len()..];
        writer.look_up(&mut draft, new.iter().map(|job| (&*job.key, &job.asked))).await?;
        for job in new {
            match writer.run(&mut draft, (&job.key, &job.asked), job.at_ms).await {
                Err(error) if error.ends_transaction() => return Err(error),
                answer => answers.push(answer),
            }
        }
        while jobs.len() < writer.config.writes_max
            && let Ok(job) = queue.try_recv()
        {
            jobs.push(job);
        }
    }
    draft.flush().await?;
    Ok(answers)
}

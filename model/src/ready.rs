//! Getting a device ready before the first request: memory for the largest step, and recorded passes.

use openlora_kernels::{Backend, ForwardScope, LoraRows, LoraSegment, SampleRow, SequenceRows, StepRows};

use crate::error::ModelError;
use crate::forward::Activations;
use crate::weights::Model;

impl<B: Backend> Model<B> {
    /// Runs a step as large as any that `act` has room for, with block tables of `table_entries` entries, in pages that are gone
    /// afterwards. What a backend allocates when it is first needed is there then, and what is free is free for the pool.
    ///
    /// # Errors
    /// Memory, or a device failure.
    pub fn warm_up(&self, act: &mut Activations<B>, table_entries: usize) -> Result<(), ModelError> {
        let (backend, spec) = (self.backend(), self.attention_spec());
        let (rows, longest) = (act.rows_max(), self.options().max_position);
        let mut sequences = Vec::new();
        let (mut positions, mut blocks) = (Vec::with_capacity(rows), 0);
        while positions.len() < rows {
            let (row, rows) = (positions.len(), longest.min(rows - positions.len()));
            let needed = rows.div_ceil(spec.block_size);
            sequences.push(SequenceRows { row, rows, table: blocks, blocks: needed });
            positions.extend(0..rows as u32);
            blocks += needed;
        }
        let mut block_tables: Vec<u32> = (0..blocks as u32).collect();
        block_tables.resize(blocks.max(table_entries), 0);
        let tokens = vec![0; rows];
        let step = StepRows {
            tokens: &tokens,
            drawn: &[],
            positions: &positions,
            sequences: &sequences,
            block_tables: &block_tables,
        };
        let wanted: Vec<u32> = (0..rows.min(act.logit_rows_max()) as u32).collect();
        let base = |rows| [LoraSegment { row: 0, rows, adapter: None }];
        let (all, some) = (base(rows), base(wanted.len()));
        let (lora, wanted_lora) = (LoraRows { segments: &all }, LoraRows { segments: &some });
        let mut pages = backend.new_pages(spec, self.layers(), blocks)?;
        self.forward(act, &step, &lora, (&wanted, &wanted_lora), &mut pages)?;
        let logits = self.logits(act, &wanted, &wanted_lora)?;
        let scored = vec![SampleRow::Score { token: 0, top: 0 }; wanted.len()];
        backend.sample(logits, &scored, &mut Vec::new())?;
        Ok(())
    }

    /// Lets the backend record all passes that decode steps of up to `rows` sequences over `act` and `pages` will need, without
    /// adapters and with; how many those are. [`Model::warm_up`] comes before.
    ///
    /// # Errors
    /// A device failure.
    pub fn record(&self, act: &mut Activations<B>, rows: usize, pages: &mut B::Pages) -> Result<usize, ModelError> {
        let mut passes = self.backend().recorded_rows(rows);
        passes.iter_mut().for_each(|rows| *rows = (*rows).min(act.rows_max()));
        passes.dedup();
        let most = passes.last().copied().unwrap_or(0);
        let zeros = vec![0; most];
        let wanted: Vec<u32> = (0..most as u32).collect();
        let sequences: Vec<_> = (0..most).map(|row| SequenceRows { row, rows: 1, table: 0, blocks: 1 }).collect();
        for &rows in &passes {
            let step = StepRows {
                tokens: &zeros[..rows],
                drawn: &[],
                positions: &zeros[..rows],
                sequences: &sequences[..rows],
                block_tables: &[0],
            };
            let base = [LoraSegment { row: 0, rows, adapter: None }];
            for segments in [&[], base.as_slice()] {
                let lora = LoraRows { segments };
                let scope = ForwardScope { all_wanted: true, ..act.scope(&step, &lora) };
                self.backend().record(&scope, pages, &mut |pages| {
                    self.run_layers(act, &step, &lora, (&wanted[..rows], &lora), pages)
                })?;
            }
        }
        Ok(2 * passes.len())
    }
}

//! Adapters come, change under their names, are pinned, load and fail to.

use openlora_scheduler::{AdapterNeed, SubmitError};
use openlora_types::Generation;

use super::{Request, World};
use crate::rng::mix;

impl World {
    pub(super) fn any_need(&mut self) -> AdapterNeed {
        self.registrations += 1;
        let mut generation = Generation([0; 32]);
        generation.0[..8].copy_from_slice(&mix(self.registrations).to_le_bytes());
        let pages = self.rng.between(1, self.traffic.adapter_pages);
        let need = AdapterNeed { generation, pages, load_micros: self.rng.between(0, 50_000) as u64 };
        self.device.needs.insert(generation, need);
        need
    }

    /// The n-th name, and rarely what a name meant before.
    pub(super) fn any_adapter(&mut self) -> AdapterNeed {
        let names = self.names.len();
        let (mut nth, mut weight) = (self.rng.between(0, names - 1), 0.0);
        let total: f64 = (1..=names).map(|n| 1.0 / n as f64).sum();
        let draw = self.rng.between(0, 1_000_000) as f64 / 1_000_000.0 * total;
        if self.traffic.zipf {
            let reached = |n: &usize| {
                weight += 1.0 / (n + 1) as f64;
                weight >= draw
            };
            nth = (0..names).find(reached).unwrap_or(names - 1);
        }
        self.names[nth]
    }

    pub(super) fn maybe_register(&mut self) {
        if self.names.is_empty() {
            return;
        }
        if self.rng.chance(self.traffic.registrations) {
            let need = self.any_need();
            let at = self.rng.between(0, self.names.len() - 1);
            self.names[at] = need;
        }
        if self.rng.chance(self.traffic.pins) {
            let unpinned = self.device.pinned.iter().next().copied().filter(|_| self.rng.chance(0.5));
            if let Some(generation) = unpinned {
                assert!(self.scheduler.unpin(generation), "{generation:?} is pinned");
                assert!(!self.scheduler.unpin(generation), "{generation:?} is pinned twice");
                self.device.pinned.remove(&generation);
            } else {
                self.pin_any();
            }
            self.scheduler.check_invariants();
        }
    }

    fn pin_any(&mut self) {
        let need = self.any_adapter();
        let own = Some(need.generation);
        let blocks = |request: &Request| request.tokens_max().div_ceil(self.config.block_size);
        // What each live request needs beside pinned adapters.
        let alone = |request: &Request| {
            let unpinned = request.new.adapter.filter(|need| !self.device.pinned.contains(&need.generation));
            blocks(request) + unpinned.filter(|need| Some(need.generation) != own).map_or(0, |need| need.pages)
        };
        let live = self.live.values().filter(|request| !request.ends()).map(alone).max().unwrap_or(0);
        let pinned = self.device.pinned_pages(own.as_ref());
        match self.scheduler.pin(need) {
            Ok(()) => {
                assert!(pinned + need.pages + live <= self.config.num_pages, "a pin takes what a live sequence needs");
                self.device.pinned.insert(need.generation);
            }
            Err(SubmitError::NoRoomForPin { pinned: told, loading, live: most, .. }) => {
                assert_eq!((told, most), (pinned, live));
                assert!(told + need.pages + most + loading > self.config.num_pages, "the pin fits");
            }
            Err(error) => panic!("{error}"),
        }
    }

    /// Loads that end now: most succeed; the others end exactly the requests that wait for them.
    pub(super) fn end_loads(&mut self) {
        while let Some(generation) = self.device.finished_load(self.step) {
            self.device.arrive(&generation);
            if !self.rng.chance(self.traffic.load_failures) {
                self.scheduler.adapter_loaded(generation);
                continue;
            }
            self.device.drop_adapter(&generation);
            self.device.pinned.remove(&generation);
            let ended = self.scheduler.adapter_failed(generation);
            let waits = |request: &Request| request.generation() == Some(generation) && request.computed.is_none();
            let waiting: Vec<_> = self.live.iter().filter(|(_, request)| waits(request)).map(|(id, _)| *id).collect();
            assert_eq!(ended, waiting, "a failed load ends who waits for it");
            self.live.retain(|id, _| !ended.contains(id));
            self.totals.failed += ended.len() as u64;
            self.scheduler.check_invariants();
        }
    }
}

//! Who is admitted next.
//!
//! **Class first.** The highest priority that waits goes first, but a class of which nothing was admitted for
//! `starvation_micros` while something of it waited has the next turn. Ageing is the class's and not each sequence's: a
//! large backlog of low priority ages as a whole, and if every old sequence of it counted as urgent, it would overrun both
//! the classes above and the tenants that send little.
//!
//! **Then the tenant that got least**, by virtual token counters (VTC; Sheng et al. 2024, "Fairness in Serving Large
//! Language Models", section 4): a tenant's counter grows by `input_weight` per prompt token when a sequence is admitted
//! and by `output_weight` per generated token, and the tenant with the smallest counter goes first. A tenant that returns
//! to the queue is lifted to the level of those that wait there, so that idleness earns no credit. Since counters of
//! waiting tenants stay within a bound of each other, none of them starves.
//!
//! **Then the oldest.** Within a tenant and class the order is that of submission; a preempted sequence takes its old
//! place. One step may prefer, inside a tenant's class, a sequence whose adapter is active to those before it (see `step.rs`):
//! that moves nothing between tenants or classes.
//!
//! A tenant whose token bucket is empty (`rate.rs`) has no turn until it has refilled; then it is lifted like one that was
//! away.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use openlora_types::{Priority, TenantId, Time};

use crate::prefix_cache::FixedMap;
use crate::rate::{Bucket, Rate};

/// Tenants without a live sequence whose counters are remembered. Past this the smallest counter is forgotten: the one
/// that lifting a returning tenant would most likely overwrite anyway; its bucket is full when it returns.
const IDLE_TENANTS_MAX: usize = 1_024;

const CLASSES: usize = 3;

/// A sequence's place in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ticket {
    pub(crate) slot: u32,
    pub(crate) tenant: u32,
    pub(crate) priority: Priority,
    /// The slot of its adapter; here, and not with the rest of the sequence, because a selection may pass over hundreds for it.
    pub(crate) adapter: Option<u32>,
    /// Number of its submission.
    pub(crate) order: u64,
    pub(crate) arrival: Time,
}

impl Ticket {
    /// Whether it was submitted `starvation_micros` ago or earlier.
    pub(crate) fn is_aged(&self, now: Time, starvation_micros: u64) -> bool {
        now.since_micros(self.arrival) >= starvation_micros
    }
}

#[derive(Debug)]
struct Tenant {
    name: TenantId,
    /// Weighted tokens of service.
    counter: u64,
    bucket: Option<Bucket>,
    /// Whether its bucket was still empty when the step began: it has no turn in the whole step.
    throttled: bool,
    /// Sequences, waiting and running.
    live: usize,
    waiting: usize,
    /// By [`Priority`], ascending; each in order of submission.
    classes: [VecDeque<Ticket>; CLASSES],
    /// During a selection: entries before these were passed over.
    cursors: [usize; CLASSES],
}

impl Tenant {
    /// Whether its bucket has something left, now and since the step began.
    fn has_turns(&self) -> bool {
        !self.throttled && !self.bucket.as_ref().is_some_and(Bucket::is_empty)
    }
}

/// What a tenant offers for admission, ordered so that the greatest goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Offer {
    /// When its class was last served, if that is too long ago.
    starved: Option<Reverse<Time>>,
    class: usize,
    counter: Reverse<u64>,
    order: Reverse<u64>,
    tenant: u32,
}

/// How a class as a whole is served.
#[derive(Clone, Copy, Debug, Default)]
struct Class {
    waiting: usize,
    /// When a sequence of it was last admitted, or began to wait where none had.
    served: Time,
}

/// The waiting sequences of all tenants. Bounded by its user: [`Scheduler::submit`](crate::Scheduler::submit) refuses
/// above `max_waiting`, and at most `max_num_seqs` more can come back by preemption.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    tenants: Vec<Option<Tenant>>,
    vacant: Vec<u32>,
    by_name: FixedMap<TenantId, u32>,
    /// Tenants with a waiting sequence, in no particular order.
    backlogged: Vec<u32>,
    /// By [`Priority`], ascending.
    classes: [Class; CLASSES],
    idle: usize,
    /// No returning tenant starts below this; it never falls.
    level: u64,
    /// The tenant whose last waiting sequence was admitted most recently.
    last_out: Option<u32>,
    /// One offer per backlogged tenant during a selection.
    offers: BinaryHeap<Offer>,
    /// Of the selection under way.
    now: Time,
    starvation_micros: u64,
}

impl Queue {
    /// An empty queue whose classes wait for their turn `starvation_micros` at most.
    pub(crate) fn new(starvation_micros: u64) -> Self {
        Self { starvation_micros, ..Self::default() }
    }

    pub(crate) fn waiting(&self) -> usize {
        self.classes.iter().map(|class| class.waiting).sum()
    }

    /// Whether more than one tenant is known, with live sequences or not long ago.
    pub(crate) fn is_shared(&self) -> bool {
        self.by_name.len() > 1
    }

    /// An equal share of so many places: at least 1; one share is for who is idle and may come back.
    fn share_of(&self, places: usize) -> usize {
        let tenants = self.by_name.len() - self.idle + usize::from(self.idle > 0);
        (places / tenants.max(1)).max(1)
    }

    /// Whether fewer sequences of a tenant run than its share of so many places.
    pub(crate) fn is_below_share(&self, tenant: u32, places: usize) -> bool {
        let tenant = self.tenant(tenant);
        tenant.live - tenant.waiting < self.share_of(places)
    }

    /// The sequence that the best of the tenants below their share would have next, as far as it is `ready`.
    pub(crate) fn first_below_share(&self, places: usize, ready: impl Fn(&Ticket) -> bool) -> Option<Ticket> {
        let below = self.backlogged.iter().filter(|&&at| self.is_below_share(at, places) && self.has_turns(at));
        let heads = below.filter_map(|&at| self.tenant(at).classes.iter().rev().find_map(VecDeque::front));
        heads
            .filter(|ticket| ready(ticket))
            .min_by_key(|ticket| (self.tenant(ticket.tenant).counter, ticket.order))
            .copied()
    }

    /// Counts one more live sequence of `name`; returns its tenant.
    pub(crate) fn join(&mut self, name: &TenantId) -> u32 {
        let tenant = match self.by_name.get(name) {
            Some(&tenant) => tenant,
            None => self.create(name),
        };
        let entry = self.tenant_mut(tenant);
        entry.live += 1;
        if entry.live == 1 {
            self.idle -= 1;
        }
        tenant
    }

    /// Counts one live sequence less.
    pub(crate) fn leave(&mut self, tenant: u32) {
        let entry = self.tenant_mut(tenant);
        entry.live -= 1;
        if entry.live == 0 {
            self.idle += 1;
            if self.idle > IDLE_TENANTS_MAX {
                self.forget_one();
            }
        }
    }

    /// Adds a new sequence; lifts its tenant's counter if nothing of it waits yet.
    pub(crate) fn submit(&mut self, ticket: Ticket, now: Time) {
        if self.tenant(ticket.tenant).waiting == 0 {
            self.lift(ticket.tenant);
        }
        self.insert(ticket, now);
    }

    /// Brings a tenant that comes back among those that have turns to their level.
    fn lift(&mut self, tenant: u32) {
        let others = self.backlogged.iter().map(|&other| self.tenant(other)).filter(|other| !other.throttled);
        let level = others.map(|other| other.counter).min();
        let level = level.or_else(|| self.last_out.map(|tenant| self.tenant(tenant).counter)).unwrap_or(0);
        self.level = self.level.max(level);
        let level = self.level;
        let tenant = self.tenant_mut(tenant);
        tenant.counter = tenant.counter.max(level);
    }

    /// From now on the tenant has this rate.
    pub(crate) fn set_rate(&mut self, tenant: u32, rate: Option<Rate>, now: Time) {
        let bucket = &mut self.tenant_mut(tenant).bucket;
        match (bucket.as_mut(), rate) {
            (Some(bucket), Some(rate)) => bucket.set_rate(rate, now),
            (_, rate) => *bucket = rate.map(|rate| Bucket::new(rate, now)),
        }
    }

    /// Fills the buckets. A tenant whose bucket is empty has no turn until it is filled; then it comes back like one that
    /// was away.
    pub(crate) fn refill(&mut self, now: Time) {
        for at in 0..self.backlogged.len() {
            let at = self.backlogged[at];
            let tenant = self.tenant_mut(at);
            let throttled = tenant.bucket.as_mut().is_some_and(|bucket| {
                bucket.fill(now);
                bucket.is_empty()
            });
            if tenant.throttled && !throttled {
                self.lift(at);
            }
            self.tenant_mut(at).throttled = throttled;
        }
    }

    /// Whether the tenant's bucket lets it have turns.
    pub(crate) fn has_turns(&self, tenant: u32) -> bool {
        self.tenant(tenant).has_turns()
    }

    /// A known tenant's waiting sequences, and when its bucket, if it is empty, has refilled.
    pub(crate) fn share(&self, name: &TenantId) -> (usize, Option<Time>) {
        self.by_name.get(name).map_or((0, None), |&at| {
            let tenant = self.tenant(at);
            let refilled = tenant.bucket.as_ref().filter(|bucket| bucket.is_empty()).map(Bucket::refilled_at);
            (tenant.waiting, refilled)
        })
    }

    /// Puts a preempted sequence back in its place: before everything of its tenant and class that was submitted later.
    /// Its tenant is not lifted; losing its blocks was not its choice.
    pub(crate) fn insert(&mut self, ticket: Ticket, now: Time) {
        let tenant = self.tenant_mut(ticket.tenant);
        let queue = &mut tenant.classes[ticket.priority as usize];
        let at = queue.partition_point(|other| other.order < ticket.order);
        queue.insert(at, ticket);
        tenant.waiting += 1;
        if tenant.waiting == 1 {
            self.backlogged.push(ticket.tenant);
        }
        let class = &mut self.classes[ticket.priority as usize];
        class.waiting += 1;
        if class.waiting == 1 {
            class.served = now;
        }
    }

    /// Takes a sequence out that ended while it waited.
    pub(crate) fn remove(&mut self, ticket: &Ticket) {
        let queue = &self.tenant(ticket.tenant).classes[ticket.priority as usize];
        let at = queue.binary_search_by_key(&ticket.order, |other| other.order).expect("a waiting sequence is queued");
        let tenant = self.tenant_mut(ticket.tenant);
        tenant.classes[ticket.priority as usize].remove(at).expect("it was just found there");
        tenant.waiting -= 1;
        if tenant.waiting == 0 {
            let position = self.backlogged.iter().position(|&other| other == ticket.tenant);
            self.backlogged.swap_remove(position.expect("a tenant with a waiting sequence is backlogged"));
        }
        self.classes[ticket.priority as usize].waiting -= 1;
    }

    /// Adds the service of `tokens` tokens, each of `weight`, to a tenant's counter, and takes them from its bucket.
    pub(crate) fn charge(&mut self, tenant: u32, tokens: u64, weight: u64, now: Time) {
        let tenant = self.tenant_mut(tenant);
        tenant.counter = tenant.counter.saturating_add(tokens * weight);
        if let Some(bucket) = &mut tenant.bucket {
            bucket.take(tokens, now);
        }
    }

    /// Starts a selection: [`Queue::next`] then returns sequence after sequence, each to be answered by [`Queue::admit`] or
    /// [`Queue::pass_over`], until the selection is left.
    pub(crate) fn begin(&mut self, now: Time) {
        self.now = now;
        for at in 0..self.backlogged.len() {
            let tenant = self.backlogged[at];
            self.tenant_mut(tenant).cursors = [0; CLASSES];
        }
        self.offer_all();
    }

    /// The sequence whose turn it is.
    pub(crate) fn next(&self) -> Option<Ticket> {
        self.offers.peek().map(|offer| {
            let tenant = self.tenant(offer.tenant);
            tenant.classes[offer.class][tenant.cursors[offer.class]]
        })
    }

    /// Whether what is kept is for a sequence of this tenant: it is below its share of so many places, or it is its turn because
    /// its class has waited too long.
    pub(crate) fn is_favoured(&self, tenant: u32, places: usize) -> bool {
        let is_starved = |offer: &Offer| offer.starved.is_some() && offer.tenant == tenant;
        self.is_below_share(tenant, places) || self.offers.peek().is_some_and(is_starved)
    }

    /// The first sequence behind the one that [`Queue::next`] returned, of the same tenant and class and among the next
    /// `lookahead`, that is `preferred`. Admitting it instead costs no other tenant or class its turn.
    pub(crate) fn prefer(&self, lookahead: usize, preferred: impl Fn(&Ticket) -> bool) -> Option<Ticket> {
        let offer = self.offers.peek()?;
        let tenant = self.tenant(offer.tenant);
        let behind = tenant.classes[offer.class].range(tenant.cursors[offer.class] + 1..);
        behind.take(lookahead).find(|ticket| preferred(ticket)).copied()
    }

    /// Takes a sequence that is admitted out of the queue; the caller charged its tenant. It is the one that [`Queue::next`]
    /// or [`Queue::prefer`] returned, or any other before the selection begins.
    pub(crate) fn admit(&mut self, ticket: &Ticket, now: Time) {
        self.remove(ticket);
        if self.tenant(ticket.tenant).waiting == 0 {
            self.last_out = Some(ticket.tenant);
        }
        self.classes[ticket.priority as usize].served = now;
        if let Some(offer) = self.offers.pop() {
            match offer.starved {
                // The class had its turn: what else it offers goes by priority again.
                Some(_) => self.offer_all(),
                None => self.offer(offer.tenant),
            }
        }
    }

    /// Leaves the sequence that [`Queue::next`] returned where it is and goes on behind it, and behind those directly after it
    /// that `hopeless` holds of as well.
    pub(crate) fn pass_over(&mut self, hopeless: impl Fn(&Ticket) -> bool) {
        let offer = self.offers.pop().expect("next returned a sequence");
        let tenant = self.tenant_mut(offer.tenant);
        let start = tenant.cursors[offer.class] + 1;
        let more = tenant.classes[offer.class].range(start..).take_while(|ticket| hopeless(ticket)).count();
        tenant.cursors[offer.class] = start + more;
        self.offer(offer.tenant);
    }

    /// Ends a selection.
    pub(crate) fn end(&mut self) {
        self.offers.clear();
    }

    fn offer_all(&mut self) {
        self.offers.clear();
        for at in 0..self.backlogged.len() {
            self.offer(self.backlogged[at]);
        }
    }

    /// Enters the best of the tenant's sequences that were not passed over.
    fn offer(&mut self, at: u32) {
        let tenant = self.tenant(at);
        if !tenant.has_turns() {
            return;
        }
        let heads = tenant.classes.iter().zip(tenant.cursors).enumerate();
        let heads = heads.filter_map(|(class, (queue, cursor))| queue.get(cursor).map(|head| (class, head)));
        let offers = heads.map(|(class, head)| {
            let served = self.classes[class].served;
            let starved = self.now.since_micros(served) >= self.starvation_micros;
            Offer {
                starved: starved.then_some(Reverse(served)),
                class,
                counter: Reverse(tenant.counter),
                order: Reverse(head.order),
                tenant: at,
            }
        });
        if let Some(offer) = offers.max() {
            self.offers.push(offer);
        }
    }

    fn create(&mut self, name: &TenantId) -> u32 {
        let tenant = Tenant {
            name: name.clone(),
            counter: 0,
            bucket: None,
            throttled: false,
            live: 0,
            waiting: 0,
            classes: Default::default(),
            cursors: [0; CLASSES],
        };
        let at = self.vacant.pop().unwrap_or_else(|| {
            self.tenants.push(None);
            u32::try_from(self.tenants.len() - 1).expect("tenants are bounded by live sequences and IDLE_TENANTS_MAX")
        });
        self.tenants[at as usize] = Some(tenant);
        self.by_name.insert(name.clone(), at);
        self.idle += 1;
        at
    }

    fn forget_one(&mut self) {
        let idle = self.tenants.iter().enumerate();
        let idle =
            idle.filter_map(|(at, tenant)| tenant.as_ref().filter(|tenant| tenant.live == 0).map(|t| (t.counter, at)));
        let (counter, at) = idle.min().expect("there are more idle tenants than IDLE_TENANTS_MAX");
        if self.last_out == Some(at as u32) {
            self.level = self.level.max(counter);
            self.last_out = None;
        }
        let tenant = self.tenants[at].take().expect("an idle tenant is there");
        self.by_name.remove(&tenant.name);
        self.vacant.push(at as u32);
        self.idle -= 1;
    }

    fn tenant(&self, at: u32) -> &Tenant {
        self.tenants[at as usize].as_ref().expect("a tenant with a live sequence is kept")
    }

    fn tenant_mut(&mut self, at: u32) -> &mut Tenant {
        self.tenants[at as usize].as_mut().expect("a tenant with a live sequence is kept")
    }

    /// Panics unless the counts and orders hold; `live` names every live sequence's tenant and whether it waits.
    pub(crate) fn check(&self, live: impl Iterator<Item = (Ticket, bool)>) {
        let mut counts = vec![(0, 0); self.tenants.len()];
        for (ticket, waits) in live {
            let (live, waiting) = &mut counts[ticket.tenant as usize];
            *live += 1;
            *waiting += usize::from(waits);
            let queue = &self.tenant(ticket.tenant).classes[ticket.priority as usize];
            let found = queue.iter().filter(|other| **other == ticket).count();
            assert_eq!(found, usize::from(waits), "queue entries of submission {}", ticket.order);
        }
        let (mut idle, mut totals) = (0, [0; CLASSES]);
        for (at, (tenant, (live, waiting))) in self.tenants.iter().zip(counts).enumerate() {
            let Some(tenant) = tenant else { continue };
            assert_eq!((tenant.live, tenant.waiting), (live, waiting), "live and waiting sequences of {}", tenant.name);
            let queued: usize = tenant.classes.iter().map(VecDeque::len).sum();
            assert_eq!(queued, waiting, "queued sequences of {}", tenant.name);
            for (queue, total) in tenant.classes.iter().zip(&mut totals) {
                *total += queue.len();
                assert!(queue.iter().is_sorted_by_key(|ticket| ticket.order), "queue order of {}", tenant.name);
            }
            let listed = self.backlogged.iter().filter(|&&other| other as usize == at).count();
            assert_eq!(listed, usize::from(waiting > 0), "whether {} is backlogged", tenant.name);
            idle += usize::from(live == 0);
        }
        assert_eq!(self.classes.map(|class| class.waiting), totals, "waiting sequences by class");
        assert_eq!(self.idle, idle, "idle tenants");
        assert!(self.idle <= IDLE_TENANTS_MAX, "more idle tenants than IDLE_TENANTS_MAX");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STARVATION: u64 = 100;

    struct Rig {
        queue: Queue,
        submitted: u64,
    }

    impl Rig {
        fn new() -> Self {
            Self { queue: Queue::new(STARVATION), submitted: 0 }
        }

        fn submit(&mut self, tenant: &str, priority: Priority, arrival: u64) -> u64 {
            let tenant = self.queue.join(&TenantId(tenant.into()));
            let order = self.submitted;
            self.submitted += 1;
            let (slot, arrival) = (order as u32, Time(arrival));
            let ticket = Ticket { slot, tenant, priority, adapter: None, order, arrival };
            self.queue.submit(ticket, arrival);
            order
        }

        /// Admits everything at `now`, each admission costing `charge`; the orders of submission.
        fn drain(&mut self, charge: u64, now: u64) -> Vec<u64> {
            self.queue.begin(Time(now));
            let mut orders = Vec::new();
            while let Some(ticket) = self.queue.next() {
                orders.push(ticket.order);
                self.queue.charge(ticket.tenant, charge, 1, Time(now));
                self.queue.admit(&ticket, Time(now));
                self.queue.leave(ticket.tenant);
            }
            self.queue.end();
            orders
        }
    }

    #[test]
    fn a_class_that_starves_has_one_turn_before_the_classes_above_it() {
        let submit = |rig: &mut Rig| {
            for (priority, arrival) in
                [(Priority::Low, 0), (Priority::Low, 0), (Priority::Normal, 10), (Priority::High, 20)]
            {
                rig.submit("t", priority, arrival);
            }
        };
        let mut rig = Rig::new();
        submit(&mut rig);
        assert_eq!(rig.drain(1, 99), [3, 2, 0, 1]);
        submit(&mut rig);
        assert_eq!(rig.drain(1, 100), [4, 7, 6, 5]);
        submit(&mut rig);
        assert_eq!(rig.drain(1, 110), [8, 10, 11, 9], "the longest starved first");
    }

    #[test]
    fn an_old_backlog_does_not_overrun_a_tenant_that_sends_little() {
        let mut rig = Rig::new();
        for _ in 0..3 {
            rig.submit("flood", Priority::Normal, 0);
        }
        rig.queue.charge(0, 100, 1, Time(0));
        let light = [200, 200].map(|arrival| {
            let order = rig.submit("light", Priority::Normal, arrival);
            rig.queue.tenants[1].as_mut().expect("light has a sequence").counter = 0;
            order
        });
        assert_eq!(rig.drain(10, 200)[..2], light);
    }

    #[test]
    fn the_tenant_that_got_least_goes_first() {
        let mut rig = Rig::new();
        for _ in 0..4 {
            rig.submit("flood", Priority::Normal, 0);
        }
        rig.submit("light", Priority::Normal, 0);
        rig.submit("light", Priority::Normal, 0);
        assert_eq!(rig.drain(5, 0), [0, 4, 1, 5, 2, 3]);
    }

    #[test]
    fn idleness_earns_no_credit() {
        let mut rig = Rig::new();
        for _ in 0..10 {
            rig.submit("busy", Priority::Normal, 0);
        }
        rig.drain(5, 0);
        // The queue is empty: the newcomer starts level with the tenant that left it last, and they take turns.
        let orders = ["busy", "new", "new", "new", "busy"].map(|name| rig.submit(name, Priority::Normal, 0));
        assert_eq!(rig.drain(5, 0), [orders[0], orders[1], orders[2], orders[4], orders[3]]);
    }

    #[test]
    fn leaving_the_queue_forgives_no_debt() {
        let mut rig = Rig::new();
        let heavy = rig.queue.join(&TenantId("heavy".into()));
        rig.submit("light", Priority::Normal, 0);
        rig.queue.charge(heavy, 7, 1, Time(0));
        rig.queue.leave(heavy);
        let heavy = rig.submit("heavy", Priority::Normal, 0);
        let light = [0, 0].map(|arrival| rig.submit("light", Priority::Normal, arrival));
        assert_eq!(rig.drain(5, 0), [0, light[0], heavy, light[1]]);
    }

    #[test]
    fn a_passed_over_sequence_keeps_its_place() {
        let mut rig = Rig::new();
        for _ in 0..3 {
            rig.submit("t", Priority::Normal, 0);
        }
        rig.queue.begin(Time(0));
        rig.queue.pass_over(|_| false);
        let second = rig.queue.next().expect("two are left");
        assert_eq!(second.order, 1);
        rig.queue.admit(&second, Time(0));
        assert_eq!(rig.drain(1, 0), [0, 2]);
    }

    #[test]
    fn a_throttled_tenant_has_no_turn_and_returns_without_credit() {
        let mut rig = Rig::new();
        let throttled = rig.queue.join(&TenantId("throttled".into()));
        rig.queue.set_rate(throttled, Some(Rate { tokens_per_second: 1_000_000, burst: 1 }), Time(0));
        rig.queue.charge(throttled, 10, 0, Time(0));
        let late = [0, 0, 0].map(|_| rig.submit("throttled", Priority::High, 0));
        rig.submit("busy", Priority::Low, 0);
        rig.queue.refill(Time(0));
        assert!(!rig.queue.has_turns(throttled));
        assert_eq!(rig.drain(100, 0), [3]);
        rig.queue.refill(Time(10));
        assert!(rig.queue.has_turns(throttled));
        assert_eq!(rig.queue.tenant(throttled).counter, 100, "it is level with the tenant that was served");
        assert_eq!(rig.drain(0, 10), late);
    }

    #[test]
    fn a_preferred_sequence_is_found_only_inside_the_tenants_class() {
        let mut rig = Rig::new();
        for (tenant, priority) in [("a", 1), ("a", 1), ("a", 0), ("b", 1), ("a", 1)] {
            rig.submit(tenant, [Priority::Low, Priority::Normal][priority], 0);
        }
        rig.queue.begin(Time(0));
        let found = |lookahead, order| rig.queue.prefer(lookahead, |ticket| ticket.order == order).map(|t| t.order);
        let cases = [(1, 1, Some(1)), (1, 4, None), (2, 4, Some(4)), (9, 0, None), (9, 2, None), (9, 3, None)];
        for (lookahead, order, expected) in cases {
            assert_eq!(found(lookahead, order), expected, "{order} among {lookahead}");
        }
    }

    #[test]
    fn tenants_that_left_are_forgotten_in_the_end() {
        let mut rig = Rig::new();
        for i in 0..IDLE_TENANTS_MAX + 10 {
            rig.submit(&format!("tenant {i}"), Priority::Normal, 0);
            rig.drain(1, 0);
        }
        assert_eq!(rig.queue.idle, IDLE_TENANTS_MAX);
        rig.queue.check(std::iter::empty());
    }
}

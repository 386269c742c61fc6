//! The promise a shared batch rests on: a row's numbers are the same whoever shares the step with it, bit for bit.

use openlora_kernels::Precision;
use openlora_types::Token;

use crate::support::{Adapter, Host, Rows, blocks_for, folders, load_adapter, open, read_cases, real_model};

/// What one request of the batch is: a prompt under an adapter or under none.
struct Request {
    tokens: Vec<Token>,
    adapter: Option<usize>,
}

fn adapters(host: &Host) -> Vec<Adapter> {
    let roots = ["golden/adapters", "golden/trained", "adapters"];
    let paths = roots.iter().flat_map(|root| folders(root).into_iter().map(move |name| format!("{root}/{name}")));
    paths.map(|path| load_adapter(host, &path)).collect()
}

/// One request per adapter and two for the base, of odd lengths, so that no segment starts on a tile's border.
fn requests(adapters: usize) -> Vec<Request> {
    let prompts: Vec<Vec<Token>> =
        read_cases::<Adapter>("golden/base.json", None).into_iter().map(|case| case.expected.prompt_ids).collect();
    let kinds = (0..adapters).map(Some).chain([None, None]);
    let of_kind = |(i, adapter): (usize, Option<usize>)| {
        let prompt = &prompts[i % prompts.len()];
        let length = (1 + i * 5 % 23).min(prompt.len());
        Request { tokens: prompt[..length].to_vec(), adapter }
    };
    kinds.enumerate().map(of_kind).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// All requests in one step, in `order`; results by request.
fn together(host: &mut Host, requests: &[Request], adapters: &[Adapter], order: &[usize]) -> Vec<Vec<u32>> {
    let mut tables = Vec::new();
    let mut next = 0;
    for request in requests {
        let blocks = blocks_for(request.tokens.len(), next);
        next += blocks.len() as u32;
        tables.push(blocks);
    }
    let rows: Vec<Rows<'_>> = order
        .iter()
        .map(|i| Rows {
            tokens: &requests[*i].tokens,
            start: 0,
            blocks: &tables[*i],
            adapter: requests[*i].adapter.map(|adapter| &adapters[adapter]),
        })
        .collect();
    let mut results = vec![Vec::new(); requests.len()];
    for (i, logits) in order.iter().zip(host.step(&rows)) {
        results[*i] = bits(&logits);
    }
    results
}

fn check_mixed_batch(precision: Precision) {
    let mut host = open(&real_model(), precision);
    let adapters = adapters(&host);
    assert!(adapters.len() >= 10);
    let requests = requests(adapters.len());
    let alone: Vec<Vec<u32>> = requests
        .iter()
        .map(|request| bits(&host.prompt(&request.tokens, request.adapter.map(|adapter| &adapters[adapter]))))
        .collect();
    let count = requests.len();
    let forwards: Vec<usize> = (0..count).collect();
    let backwards: Vec<usize> = (0..count).rev().collect();
    // A step coprime to the count visits every request once.
    let stride = (2..).find(|stride| gcd(*stride, count) == 1).expect("some number is coprime");
    let scattered: Vec<usize> = (0..count).map(|i| (i * stride + 1) % count).collect();
    let half: Vec<usize> = (0..count).filter(|i| i % 2 == 0).collect();
    for order in [forwards, backwards, scattered, half] {
        let mixed = together(&mut host, &requests, &adapters, &order);
        for i in &order {
            assert!(
                mixed[*i] == alone[*i],
                "request {i} (adapter {:?}) depends on its neighbours",
                requests[*i].adapter
            );
        }
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[test]
fn a_mixed_batch_in_f32_gives_each_request_what_it_gets_alone() {
    check_mixed_batch(Precision::F32);
}

#[test]
fn a_mixed_quantised_batch_gives_each_request_what_it_gets_alone() {
    check_mixed_batch(Precision::Quantised);
}

fn check_chunks(precision: Precision) {
    let mut host = open(&real_model(), precision);
    let adapter = load_adapter(&host, "golden/adapters/qv-r8");
    let prompt = read_cases::<Adapter>("golden/base.json", None).swap_remove(0).expected.prompt_ids;
    let whole = bits(&host.prompt(&prompt, Some(&adapter)));
    let (blocks, other) = (blocks_for(prompt.len(), 40), blocks_for(64, 60));
    for chunk in [1, 7, 16] {
        let mut pieces = Vec::new();
        for (i, tokens) in prompt.chunks(chunk).enumerate() {
            // A neighbour of the base model decodes beside each chunk.
            let neighbour = Rows { tokens: &prompt[i % prompt.len()..][..1], start: i, blocks: &other, adapter: None };
            let rows = Rows { tokens, start: i * chunk, blocks: &blocks, adapter: Some(&adapter) };
            pieces.extend(bits(&host.step(&[neighbour, rows])[1]));
        }
        assert!(pieces == whole, "chunks of {chunk} differ from the whole prompt");
    }
}

#[test]
fn a_prompt_in_chunks_gives_what_it_gives_whole() {
    check_chunks(Precision::F32);
    check_chunks(Precision::Quantised);
}

#[test]
fn rows_that_nobody_wants_end_early_and_change_no_bit_of_the_others() {
    for precision in [Precision::F32, Precision::Quantised] {
        let mut host = open(&real_model(), precision);
        let adapter = load_adapter(&host, "golden/adapters/qv-r8");
        let prompt = read_cases::<Adapter>("golden/base.json", None).swap_remove(0).expected.prompt_ids;
        let (blocks, other) = (blocks_for(prompt.len(), 40), blocks_for(prompt.len(), 60));
        let sequences = [
            Rows { tokens: &prompt, start: 0, blocks: &blocks, adapter: Some(&adapter) },
            Rows { tokens: &prompt[..9], start: 0, blocks: &other, adapter: None },
        ];
        let vocab = host.model.shape().vocab;
        let all = bits(&host.step(&sequences).concat());
        let rows = prompt.len() as u32 + 9;
        let next = Rows { tokens: &prompt[..1], start: prompt.len(), blocks: &blocks, adapter: Some(&adapter) };
        let after_all = bits(&host.step(&[next])[0]);
        for wanted in [vec![rows - 10, rows - 1], vec![0, 5, rows - 3], vec![]] {
            host.forget();
            let found = bits(&host.step_wanted(&sequences, &wanted));
            let expected: Vec<_> =
                wanted.iter().flat_map(|row| &all[*row as usize * vocab..][..vocab]).copied().collect();
            assert!(found == expected, "{precision:?}, rows {wanted:?}");
            // What unwanted rows stored serves the next step.
            assert!(bits(&host.step(&[next])[0]) == after_all, "{precision:?}, after rows {wanted:?}");
        }
    }
}

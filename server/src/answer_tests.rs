//! What the assembling of answers promises, on events as the engine sends them and a real tokenizer of bytes.

use std::path::Path;

use super::*;

fn tokenizer() -> Tokenizer {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/models/llama3");
    Tokenizer::from_folder(Path::new(folder)).expect("a fixture's tokenizer")
}

fn wanted() -> Wanted {
    Wanted {
        samples: 1,
        stops: Vec::new(),
        include_stop: false,
        token_ids: true,
        logprobs: false,
        generation: "abcd".into(),
        request_id: "mine".into(),
        receipt_id: "c0ffee".into(),
    }
}

fn output(token: u32) -> TokenOutput {
    let top = vec![TokenLogprob { token: 54, logprob: -0.5 }];
    TokenOutput { chosen: TokenLogprob { token, logprob: -1.5 }, top }
}

fn token(index: u32, token: u32) -> Event {
    Event::Token { index, output: output(token) }
}

fn usage() -> Usage {
    Usage { prompt_tokens: 3, cached_prompt_tokens: 1, completion_tokens: 9 }
}

/// All messages where the reader takes one after each event.
fn messages(answer: &mut Answer, events: Vec<Event>) -> (Vec<wire::GenerateStreamResponse>, Vec<u32>) {
    let (mut messages, mut stopped) = (Vec::new(), Vec::new());
    for event in events {
        match answer.take(event) {
            Next::StopSample(index) => stopped.push(index),
            Next::Failed(error) => panic!("{error}"),
            Next::GoOn | Next::Complete(_) => {}
        }
        messages.extend(answer.message());
    }
    messages.extend(std::iter::from_fn(|| answer.message()));
    (messages, stopped)
}

fn run(wanted: Wanted, events: Vec<Event>) -> (Vec<wire::GenerateStreamResponse>, Vec<u32>) {
    messages(&mut Answer::new(tokenizer(), wanted).expect("no empty stop string"), events)
}

fn text_events(text: &str) -> Vec<Event> {
    let tokens = tokenizer().encode(text, false).expect("tokens");
    let mut events: Vec<_> = tokens.into_iter().map(|id| token(0, id)).collect();
    events.push(Event::Finished { index: 0, reason: FinishReason::Length });
    events.push(Event::Done { usage: usage() });
    events
}

#[test]
fn the_stream_is_whole_characters_and_its_last_message_has_the_usage() {
    let text = "naïve café — 東京 🙂.";
    let (messages, stopped) = run(wanted(), text_events(text));
    assert!(stopped.is_empty());
    assert_eq!(messages.iter().map(|message| message.text.as_str()).collect::<String>(), text);
    assert!(messages.iter().all(|message| !message.text.contains('\u{FFFD}')));
    let ids: Vec<_> = messages.iter().flat_map(|message| message.token_ids.clone()).collect();
    assert_eq!(ids, tokenizer().encode(text, false).expect("tokens"));
    let finishes = messages.iter().filter(|message| message.finish_reason() == wire::FinishReason::Length);
    assert_eq!(finishes.count(), 1);
    let (last, before) = messages.split_last().expect("messages");
    assert!(before.iter().all(|message| message.usage.is_none() && message.generation.is_empty()));
    assert_eq!((last.generation.as_str(), last.request_id.as_str()), ("abcd", "mine"));
    assert_eq!(last.usage, Some(wire::Usage { prompt_tokens: 3, cached_prompt_tokens: 1, completion_tokens: 9 }));
}

#[test]
fn a_reader_that_was_away_gets_what_gathered_as_few_messages() {
    let mut answer = Answer::new(tokenizer(), wanted()).expect("an answer");
    for event in text_events("The river and the sea.") {
        assert!(matches!(answer.take(event), Next::GoOn | Next::Complete(_)));
    }
    let message = answer.message().expect("one message");
    assert_eq!(message.text, "The river and the sea.");
    assert!(message.usage.is_some());
    assert_eq!(answer.message(), None);
    let mut answer = Answer::new(tokenizer(), wanted()).expect("an answer");
    let mut taken = 0;
    while !answer.is_full() {
        answer.take(token(0, 54));
        taken += 1;
    }
    assert_eq!(taken, TOKENS_PER_MESSAGE_MAX);
}

#[test]
fn a_stop_string_across_tokens_ends_its_sample_and_what_follows_is_not_shown() {
    let stops = vec!["the s".to_owned()];
    let (messages, stopped) = run(Wanted { stops: stops.clone(), ..wanted() }, text_events("The river and the sea."));
    assert_eq!(stopped, [0]);
    assert_eq!(messages.iter().map(|message| message.text.as_str()).collect::<String>(), "The river and ");
    let finishes: Vec<_> = messages
        .iter()
        .map(|message| message.finish_reason())
        .filter(|&r| r != wire::FinishReason::Unspecified)
        .collect();
    assert_eq!(finishes, [wire::FinishReason::Stop]);
    assert!(messages.last().expect("messages").usage.is_some());
    let (messages, _) = run(Wanted { stops, include_stop: true, ..wanted() }, text_events("The river and the sea."));
    assert_eq!(messages.iter().map(|message| message.text.as_str()).collect::<String>(), "The river and the s");
}

#[test]
fn text_held_back_for_a_stop_string_comes_out_at_the_end() {
    let stops = vec!["sea. And".to_owned()];
    let (messages, stopped) = run(Wanted { stops, token_ids: false, ..wanted() }, text_events("and the sea."));
    assert!(stopped.is_empty());
    assert_eq!(messages.iter().map(|message| message.text.as_str()).collect::<String>(), "and the sea.");
    assert!(messages.iter().all(|message| !message.text.is_empty() || message.usage.is_some()), "no empty messages");
}

#[test]
fn samples_keep_apart_and_the_answer_at_once_is_the_stream_put_together() {
    let events = || {
        vec![
            Event::PromptLogprobs(vec![output(260)]),
            Event::PromptLogprobs(vec![output(223), output(84)]),
            token(0, 54),
            token(1, 260),
            token(1, 223),
            token(0, 260),
            Event::Finished { index: 1, reason: FinishReason::Stop },
            token(0, 16),
            Event::Finished { index: 0, reason: FinishReason::Length },
            Event::Done { usage: usage() },
        ]
    };
    let wanted = Wanted { samples: 2, logprobs: true, ..wanted() };
    let (messages, _) = run(wanted, events());
    let samples = (0..2).map(|index| wire::Sample { index, ..Default::default() }).collect();
    let mut response = wire::GenerateResponse { samples, ..Default::default() };
    messages.into_iter().for_each(|message| merge(&mut response, message));
    assert_eq!(response.samples[0].text, "The.");
    assert_eq!(response.samples[1].text, "he ");
    assert_eq!(response.samples[0].token_ids, [54, 260, 16]);
    assert_eq!(response.samples[0].finish_reason(), wire::FinishReason::Length);
    assert_eq!(response.samples[1].finish_reason(), wire::FinishReason::Stop);
    let scored: Vec<_> = response.prompt_logprobs.iter().filter_map(|entry| entry.chosen.as_ref()).collect();
    assert_eq!(scored.iter().map(|chosen| chosen.token_id).collect::<Vec<_>>(), [260, 223, 84]);
    let first = &response.samples[0].logprobs[0];
    assert_eq!(first.chosen, Some(wire::TokenLogprob { token_id: 54, logprob: -1.5, text: "T".into() }));
    assert_eq!(first.top, [wire::TokenLogprob { token_id: 54, logprob: -0.5, text: "T".into() }]);
    assert_eq!(response.samples[0].logprobs.len(), 3);
    assert!(response.usage.is_some());
}

#[test]
fn log_probabilities_and_ids_are_there_only_where_asked_for() {
    let (messages, _) = run(Wanted { token_ids: false, ..wanted() }, text_events("The river"));
    assert!(messages.iter().all(|message| message.token_ids.is_empty() && message.logprobs.is_empty()));
}

//! `openlora generate`: one question, streamed to the terminal.

use std::io::{IsTerminal, Read, Write};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Args;
use openlora_proto::v1::generate_request::Prompt;
use openlora_proto::v1::{
    Chat, ChatMessage, FinishReason, GenerateRequest, GenerateStreamResponse, OutputOptions, SamplingParameters,
    TokenLogprobs, Usage,
};
use serde_json::{Value, json};

use crate::Global;
use crate::client::{Client, ClientArgs, explain};

#[derive(Args)]
#[command(after_help = "Examples:
  openlora generate \"Why is the sky blue?\"
  openlora generate --adapter acme/cwe \"What is CWE-79?\"
  echo \"def fib(n):\" | openlora generate --raw --max-tokens 64 -
  openlora generate --json --logprobs 3 --temperature 0 \"The capital of France?\"")]
pub(crate) struct GenerateArgs {
    /// What to ask; `-` reads standard input
    prompt: String,
    /// `alias` or `alias@generation`; the base model when left out
    #[arg(long, short, default_value = "", value_name = "ALIAS")]
    adapter: String,
    /// Give the prompt as it is, without the chat template
    #[arg(long)]
    raw: bool,
    /// The system message of the chat
    #[arg(long, conflicts_with = "raw", value_name = "TEXT")]
    system: Option<String>,
    /// Tokens to generate at most
    #[arg(long, default_value_t = 256)]
    max_tokens: u32,
    /// 0 always takes the most probable token
    #[arg(long, default_value_t = 0.7)]
    temperature: f32,
    /// Keep the k most probable tokens; 0 keeps all
    #[arg(long)]
    top_k: Option<u32>,
    /// Keep the smallest set of tokens that reaches this probability
    #[arg(long)]
    top_p: Option<f32>,
    /// Drop tokens less probable than this share of the best
    #[arg(long)]
    min_p: Option<f32>,
    /// The same seed gives the same answer
    #[arg(long)]
    seed: Option<u64>,
    /// End before this text; may be repeated
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Report this many alternatives with each token (with --json)
    #[arg(long, value_name = "N")]
    logprobs: Option<u32>,
    #[command(flatten)]
    client: ClientArgs,
}

pub(crate) fn run(global: &Global, args: &GenerateArgs) -> Result<ExitCode> {
    let request = request(global, args)?;
    crate::block_on(async {
        let client = Client::connect(&args.client).await?;
        let began = Instant::now();
        let mut stream =
            client.inference().generate_stream(request).await.map_err(|status| explain(&status))?.into_inner();
        let mut answer = Answer::default();
        let mut first = None;
        loop {
            // Ctrl-C drops the stream, which ends the request in the server.
            let message = tokio::select! {
                message = stream.message() => message.map_err(|status| explain(&status))?,
                _ = tokio::signal::ctrl_c() => return Ok(ExitCode::from(130)),
            };
            let Some(message) = message else { break };
            first.get_or_insert_with(|| began.elapsed());
            if !global.json {
                let mut out = std::io::stdout().lock();
                out.write_all(message.text.as_bytes())?;
                out.flush()?;
            }
            answer.take(message);
        }
        if global.json {
            println!("{}", answer.to_json());
        } else {
            println!();
            let (tokens, seconds) = (answer.usage.completion_tokens, began.elapsed().as_secs_f64());
            if std::io::stderr().is_terminal() {
                let first = first.unwrap_or_default().as_millis();
                eprintln!("{tokens} tokens in {seconds:.2} s, first after {first} ms");
            }
        }
        Ok(ExitCode::SUCCESS)
    })
}

fn request(global: &Global, args: &GenerateArgs) -> Result<GenerateRequest> {
    let mut text = args.prompt.clone();
    if text == "-" {
        text.clear();
        std::io::stdin().read_to_string(&mut text).context("standard input")?;
    }
    let message = |role: &str, content: &str| ChatMessage { role: role.into(), content: content.into() };
    let prompt = if args.raw {
        Prompt::Text(text)
    } else {
        let system = args.system.iter().map(|content| message("system", content));
        let messages = system.chain([message("user", &text)]).collect();
        Prompt::Chat(Chat { messages, add_generation_prompt: None })
    };
    let sampling = SamplingParameters {
        temperature: Some(args.temperature),
        top_k: args.top_k,
        top_p: args.top_p,
        min_p: args.min_p,
        seed: args.seed,
        stop: args.stop.clone(),
        max_tokens: Some(args.max_tokens),
        ..SamplingParameters::default()
    };
    Ok(GenerateRequest {
        adapter: args.adapter.clone(),
        prompt: Some(prompt),
        sampling: Some(sampling),
        output: Some(OutputOptions { logprobs: args.logprobs, prompt_logprobs: None, token_ids: Some(global.json) }),
        ..GenerateRequest::default()
    })
}

/// What has come so far.
#[derive(Default)]
struct Answer {
    text: String,
    token_ids: Vec<u32>,
    logprobs: Vec<TokenLogprobs>,
    finish_reason: Option<FinishReason>,
    usage: Usage,
    generation: String,
    receipt_id: String,
}

impl Answer {
    fn take(&mut self, message: GenerateStreamResponse) {
        if message.finish_reason() != FinishReason::Unspecified {
            self.finish_reason = Some(message.finish_reason());
        }
        self.text.push_str(&message.text);
        self.token_ids.extend(message.token_ids);
        self.logprobs.extend(message.logprobs);
        if let Some(usage) = message.usage {
            self.usage = usage;
            self.generation = message.generation;
            self.receipt_id = message.receipt_id;
        }
    }

    fn to_json(&self) -> Value {
        let candidate = |logprob: &openlora_proto::v1::TokenLogprob| json!({"token_id": logprob.token_id, "logprob": logprob.logprob, "text": logprob.text});
        let logprobs = self.logprobs.iter().map(|entry| {
            let top: Vec<_> = entry.top.iter().map(candidate).collect();
            json!({"chosen": entry.chosen.as_ref().map(candidate), "top": top})
        });
        json!({
            "text": self.text,
            "token_ids": self.token_ids,
            "logprobs": logprobs.collect::<Vec<_>>(),
            "finish_reason": match self.finish_reason {
                Some(FinishReason::Stop) => "stop",
                Some(FinishReason::Length) => "length",
                _ => "",
            },
            "usage": {
                "prompt_tokens": self.usage.prompt_tokens,
                "cached_prompt_tokens": self.usage.cached_prompt_tokens,
                "completion_tokens": self.usage.completion_tokens,
            },
            "generation": self.generation,
            "receipt_id": self.receipt_id,
        })
    }
}

//! Visitors who have something to say, or go.

use rvpn_proto::packer::{Failure, Word, code};
use tokio::time::Instant;

use super::State;
use crate::packer::bell::Number;
use crate::packer::pipe::{Ended, PARTING};

impl State {
    /// Looks after a visitor who rang.
    pub(in crate::packer) fn look(&mut self, number: Number, now: Instant) {
        let Some(visitor) = self.visitors.get_mut(&number) else {
            return;
        };
        let news = visitor.pipe.news();
        if news.data && !visitor.queued && !visitor.paused && !visitor.told {
            visitor.queued = true;
            self.ready.push_back(number);
        }
        let Some(how) = news.ended else {
            return self.turn(number, news.turn);
        };
        if !std::mem::replace(&mut visitor.parting, true) {
            self.parting.push_back((now, number));
        }
        self.turn(number, news.turn);
        // What it said before it ended in order is sent first.
        let unsaid = news.data && how == Ended::Clean && !news.deaf;
        if !unsaid {
            self.farewell(number, how, news.gone, now);
        }
    }

    /// A visitor has ended, and nothing of it is left to be sent.
    fn farewell(&mut self, number: Number, how: Ended, gone: bool, now: Instant) {
        let Some(visitor) = self.visitors.get_mut(&number) else {
            return;
        };
        let first = !std::mem::replace(&mut visitor.told, true);
        let heard = visitor.heard;
        // A client that never heard of it, or is done with it, need not hear
        // that it left.
        if first && visitor.begun && !heard {
            match how {
                Ended::Clean => self.say(number, Word::End, self.quiet()),
                Ended::Broken => {
                    let failure = Failure {
                        code: code::CLOSED,
                        message: "the visitor's connection broke",
                    };
                    let body = self.trouble(failure);
                    self.say(number, Word::Error, &body);
                }
            }
        }
        if gone {
            self.leave(number, heard, now);
        }
    }

    pub(super) fn leave(&mut self, number: Number, done: bool, now: Instant) {
        if let Some(visitor) = self.visitors.remove(&number) {
            self.ids.leave(&visitor.id, done || !visitor.begun, now);
        }
    }

    /// When somebody's time to part is over.
    pub(in crate::packer) fn parting(&self) -> Option<Instant> {
        self.parting.front().map(|(since, _)| *since + PARTING)
    }

    /// Cuts off visitors whose clients do not end them.
    pub(in crate::packer) fn part(&mut self, now: Instant) {
        while self.parting().is_some_and(|at| at <= now)
            && let Some((_, number)) = self.parting.pop_front()
        {
            if let Some(visitor) = self.visitors.get(&number)
                && !visitor.heard
            {
                self.cut(number, now);
            }
        }
    }

    /// Puts the next frame that is no visitor's bytes into `buffer`, if there is one.
    pub(in crate::packer) fn last_word(&mut self, buffer: &mut Vec<u8>) -> bool {
        buffer.clear();
        let word = self.words.pop_front();
        word.is_some_and(|word| {
            buffer.extend_from_slice(&word);
            true
        })
    }

    /// Puts the next frame to send into `buffer`, words first. False if there
    /// is none.
    pub(in crate::packer) fn frame(&mut self, buffer: &mut Vec<u8>, now: Instant) -> bool {
        if self.last_word(buffer) {
            return true;
        }
        while let Some(number) = self.ready.pop_front() {
            let Some(visitor) = self.visitors.get_mut(&number) else {
                continue;
            };
            visitor.queued = false;
            if visitor.paused || visitor.told {
                continue;
            }
            visitor.pipe.take(&mut self.spare);
            let framed = match self.spare.is_empty() {
                true => false,
                false => {
                    visitor.begun = true;
                    let word = Word::Data(visitor.visit.service.as_str());
                    let frame = visitor.frame(word, &self.spare);
                    frame.encode(self.profile, buffer).is_ok()
                }
            };
            // It may have ended behind what was just taken.
            self.look(number, now);
            if framed {
                return true;
            }
        }
        false
    }

    /// Ends everybody: the client is gone.
    pub(in crate::packer) fn end(&mut self) {
        // Nobody is sent here any more.
        self.tokens.clear();
        self.member = None;
        for visitor in self.visitors.values() {
            visitor.pipe.end(Ended::Broken);
        }
        self.visitors.clear();
    }
}

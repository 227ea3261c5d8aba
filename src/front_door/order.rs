//! The order of a client's answers: servers answer when they can, a client gets its answers in the order in which it asked.

use std::collections::VecDeque;

use bytes::Bytes;

use super::answers::Piece;

/// Number of an event whose acknowledgement an answer waits for.
pub type Receipt = u64;

/// An answer is held until Kafka has acknowledged an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// The event's number.
    pub receipt: Receipt,
    /// What the client is told if Kafka does not; the same if there is nothing.
    pub failure: Option<Bytes>,
}

/// Answers that came together from one server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// To so many commands, or pieces of commands.
    pub commands: u32,
    /// What the client is shown.
    pub bytes: Bytes,
    /// Of the one piece that this answers; [`Piece::Whole`] of whole commands.
    pub piece: Piece,
    /// A piece that ends its command.
    pub failed: bool,
    /// What it waits for.
    pub held: Option<Held>,
}

enum Run {
    /// Known at once.
    Here(Bytes),
    /// From this server, so many.
    From { server: u32, commands: u32 },
}

/// An answer that waits for Kafka, or behind one that does.
struct Waiting {
    bytes: Bytes,
    held: Option<Held>,
    piece: Piece,
}

/// See the module.
#[derive(Default)]
pub struct Order {
    runs: VecDeque<Run>,
    /// What servers have answered before it was their turn, by server; most often nothing.
    early: Vec<VecDeque<Part>>,
    early_bytes: usize,
    /// What the client can be told, up to the first that is held.
    ready: VecDeque<Bytes>,
    /// From the first that is held on.
    held: VecDeque<Waiting>,
    /// A piece has failed: the rest of its command is dropped.
    dropping: bool,
    commands: u32,
    /// Bytes in `ready` and `held`.
    unsent: usize,
    /// Bytes in `ready`.
    ready_bytes: usize,
}

impl Order {
    /// Bytes that the client can be told, or will be.
    pub fn unsent(&self) -> usize {
        self.unsent + self.early_bytes
    }

    /// Of these, what it can be told now.
    pub fn tellable(&self) -> usize {
        self.ready_bytes
    }

    /// Commands whose answers are not there yet.
    pub fn commands(&self) -> u32 {
        self.commands
    }

    /// Whether nothing waits here.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty() && self.ready.is_empty() && self.held.is_empty()
    }

    /// The client has sent what this answers.
    pub fn answer(&mut self, bytes: Bytes) {
        if bytes.is_empty() {
            return;
        }
        if self.runs.is_empty() {
            self.show(bytes, None, Piece::Whole);
        } else {
            self.runs.push_back(Run::Here(bytes));
        }
    }

    /// The client has sent a command, or a piece of one, that this server answers. Whether the answer follows the one to the
    /// command before, from the same server: then both may come in one part.
    pub fn ask(&mut self, server: u32) -> bool {
        self.commands += 1;
        match self.runs.back_mut() {
            Some(Run::From { server: last, commands }) if *last == server => {
                *commands += 1;
                true
            }
            _ => {
                self.runs.push_back(Run::From { server, commands: 1 });
                false
            }
        }
    }

    /// This server has answered.
    pub fn answered(&mut self, server: u32, part: Part) {
        match self.runs.front() {
            Some(Run::From { server: first, .. }) if *first == server => self.take(part),
            _ => {
                let server = server as usize;
                if self.early.len() <= server {
                    self.early.resize_with(server + 1, VecDeque::new);
                }
                self.early_bytes += part.bytes.len();
                self.early[server].push_back(part);
                return;
            }
        }
        self.advance();
    }

    /// Kafka has acknowledged this, or not.
    pub fn acknowledged(&mut self, receipt: Receipt, acknowledged: bool) {
        let waits = |held: &Option<Held>| held.as_ref().is_some_and(|held| held.receipt == receipt);
        if let Some(at) = self.held.iter().position(|waiting| waits(&waiting.held)) {
            self.decide(at, acknowledged);
        } else if let Some(part) = self.early.iter_mut().flatten().find(|part| waits(&part.held)) {
            // It is not its turn yet.
            let failure = part.held.take().and_then(|held| held.failure);
            if let Some(failure) = failure.filter(|_| !acknowledged) {
                self.early_bytes = self.early_bytes + failure.len() - part.bytes.len();
                part.bytes = failure;
                part.failed = part.piece != Piece::Whole;
            }
            return;
        }
        while self.held.front().is_some_and(|waiting| waiting.held.is_none())
            && let Some(Waiting { bytes, .. }) = self.held.pop_front()
        {
            if !bytes.is_empty() {
                self.ready_bytes += bytes.len();
                self.ready.push_back(bytes);
            }
        }
    }

    /// Kafka has decided what is said here.
    fn decide(&mut self, at: usize, acknowledged: bool) {
        let Some(failure) = self.held[at].held.take().and_then(|held| held.failure) else {
            return;
        };
        if acknowledged {
            return;
        }
        self.unsent = self.unsent + failure.len() - self.held[at].bytes.len();
        self.held[at].bytes = failure;
        if self.held[at].piece != Piece::More {
            return;
        }
        // The rest of its command says nothing: what is here, up to its last piece, and what is still to come.
        for later in self.held.range_mut(at + 1..) {
            self.unsent -= later.bytes.len();
            later.bytes = Bytes::new();
            if let Some(held) = &mut later.held {
                held.failure = None;
            }
            if later.piece == Piece::Last {
                return;
            }
        }
        self.dropping = true;
    }

    /// The next bytes for the client.
    pub fn pop(&mut self) -> Option<Bytes> {
        let bytes = self.ready.pop_front()?;
        self.unsent -= bytes.len();
        self.ready_bytes -= bytes.len();
        Some(bytes)
    }

    fn take(&mut self, part: Part) {
        let Some(Run::From { commands, .. }) = self.runs.front_mut() else {
            return;
        };
        debug_assert!(part.commands <= *commands, "a part is of one run");
        *commands -= part.commands.min(*commands);
        if *commands == 0 {
            self.runs.pop_front();
        }
        self.commands -= part.commands.min(self.commands);
        let dropped = self.dropping && part.piece != Piece::Whole;
        match part.piece {
            Piece::More if part.failed => self.dropping = true,
            Piece::Last => self.dropping = false,
            _ => {}
        }
        let (mut bytes, mut held) = (part.bytes, part.held);
        if dropped {
            bytes = Bytes::new();
            // Nor what Kafka says of it.
            if let Some(held) = &mut held {
                held.failure = None;
            }
        }
        self.show(bytes, held, part.piece);
    }

    fn show(&mut self, bytes: Bytes, held: Option<Held>, piece: Piece) {
        self.unsent += bytes.len();
        if held.is_some() || !self.held.is_empty() {
            // An empty piece may be the end of its command.
            if held.is_some() || !bytes.is_empty() || piece != Piece::Whole {
                self.held.push_back(Waiting { bytes, held, piece });
            }
        } else if !bytes.is_empty() {
            self.ready_bytes += bytes.len();
            self.ready.push_back(bytes);
        }
    }

    /// Goes on to what has come early.
    fn advance(&mut self) {
        loop {
            let server = match self.runs.front() {
                Some(Run::Here(_)) => {
                    if let Some(Run::Here(bytes)) = self.runs.pop_front() {
                        self.show(bytes, None, Piece::Whole);
                    }
                    continue;
                }
                Some(Run::From { server, .. }) => *server,
                None => return,
            };
            let Some(part) = self.early.get_mut(server as usize).and_then(VecDeque::pop_front) else {
                return;
            };
            self.early_bytes -= part.bytes.len();
            self.take(part);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn part(text: &'static str) -> Part {
        Part {
            commands: 1,
            bytes: Bytes::from_static(text.as_bytes()),
            piece: Piece::Whole,
            failed: false,
            held: None,
        }
    }

    fn all(order: &mut Order) -> String {
        let mut out = String::new();
        while let Some(bytes) = order.pop() {
            out.push_str(std::str::from_utf8(&bytes).unwrap());
        }
        out
    }

    #[test]
    fn nobody_overtakes() {
        let mut order = Order::default();
        assert!(!order.ask(0));
        assert!(order.ask(0));
        order.answer(Bytes::from_static(b"MN "));
        assert!(!order.ask(1));
        assert!(!order.ask(0));
        order.answered(1, part("c "));
        assert_eq!(all(&mut order), "");
        order.answered(
            0,
            Part {
                commands: 2,
                ..part("a b ")
            },
        );
        assert_eq!(all(&mut order), "a b MN c ");
        order.answered(0, part("d "));
        assert_eq!(all(&mut order), "d ");
        assert!(order.is_empty() && order.commands() == 0);
    }

    #[test]
    fn what_is_held_holds_what_follows() {
        let mut order = Order::default();
        let held = |receipt| {
            let failure = Some(Bytes::from_static(b"no "));
            Some(Held { receipt, failure })
        };
        (0..4).for_each(|_| _ = order.ask(0));
        order.answered(0, part("a "));
        order.answered(
            0,
            Part {
                held: held(7),
                ..part("b ")
            },
        );
        order.answered(
            0,
            Part {
                held: held(8),
                ..part("c ")
            },
        );
        order.answered(0, part("d "));
        assert_eq!(all(&mut order), "a ");
        order.acknowledged(8, false);
        assert_eq!(all(&mut order), "");
        order.acknowledged(7, true);
        assert_eq!(all(&mut order), "b no d ");
        assert!(order.is_empty());
    }

    #[test]
    fn what_was_early_has_been_acknowledged_when_its_turn_comes() {
        let mut order = Order::default();
        let held = |receipt, text| Part {
            held: Some(Held {
                receipt,
                failure: Some(Bytes::from_static(b"no ")),
            }),
            ..part(text)
        };
        [0, 1, 1].iter().for_each(|&server| _ = order.ask(server));
        order.answered(1, held(5, "b "));
        order.answered(1, held(6, "c "));
        assert_eq!(order.unsent(), 4);
        order.acknowledged(5, true);
        order.acknowledged(6, false);
        order.answered(0, part("a "));
        assert_eq!(all(&mut order), "a b no ");
        assert!(order.is_empty() && order.unsent() == 0);
    }

    #[test]
    fn of_a_command_that_kafka_did_not_take_nothing_more_is_shown() {
        for late in [false, true] {
            let mut order = Order::default();
            let piece = |piece, receipt, text| Part {
                piece,
                held: Some(Held {
                    receipt,
                    failure: Some(Bytes::from_static(b"ERROR ")),
                }),
                ..part(text)
            };
            [0, 1, 0, 1].iter().for_each(|&server| _ = order.ask(server));
            order.answered(0, piece(Piece::More, 1, "a "));
            order.answered(1, piece(Piece::More, 2, "b "));
            let last = piece(Piece::Last, 3, "c END ");
            if late {
                order.acknowledged(1, false);
                order.answered(0, last);
            } else {
                order.answered(0, last);
                order.acknowledged(1, false);
            }
            order.answered(1, part("next "));
            order.acknowledged(3, false);
            order.acknowledged(2, true);
            assert_eq!(all(&mut order), "ERROR next ", "late: {late}");
            assert!(order.is_empty() && order.unsent() == 0);
        }
    }

    #[test]
    fn of_a_command_that_failed_nothing_more_is_shown() {
        let mut order = Order::default();
        let piece = |piece, failed, text| Part {
            piece,
            failed,
            ..part(text)
        };
        [0, 1, 0, 1].iter().for_each(|&server| _ = order.ask(server));
        order.answered(1, piece(Piece::More, true, "ERROR "));
        order.answered(0, piece(Piece::More, false, "a "));
        order.answered(0, piece(Piece::Last, false, "c END "));
        order.answered(1, part("next "));
        assert_eq!(all(&mut order), "a ERROR next ");
    }

    proptest! {
        #[test]
        fn answers_come_in_the_order_of_the_questions(servers in proptest::collection::vec(0u32..4, 1..60), picks in proptest::collection::vec(any::<proptest::sample::Index>(), 60)) {
            let mut order = Order::default();
            let mut queues: [VecDeque<usize>; 4] = Default::default();
            for (n, &server) in servers.iter().enumerate() {
                order.ask(server);
                queues[server as usize].push_back(n);
            }
            let mut shown = Vec::new();
            for pick in picks {
                let open: Vec<usize> = (0..4).filter(|&server| !queues[server].is_empty()).collect();
                let Some(&server) = open.get(pick.index(open.len().max(1))) else { break };
                let n = queues[server].pop_front().unwrap();
                let bytes = Bytes::from(vec![n as u8]);
                order.answered(server as u32, Part { commands: 1, bytes, piece: Piece::Whole, failed: false, held: None });
                while let Some(bytes) = order.pop() {
                    shown.extend_from_slice(&bytes);
                }
            }
            let expected: Vec<u8> = (0..servers.len() as u8).collect();
            prop_assert_eq!(shown, expected);
        }
    }
}

# SPDX-License-Identifier: Apache-2.0
"""Bounds on what is read from the network or from a bundle, each with its reason.

A reader compares a claimed size with its bound before it allocates or parses anything.
"""

from __future__ import annotations

from typing import Final

MAX_HEADER_BYTES: Final = 64 * 1024  # update and plan headers; honest ones are about 300 bytes
MAX_PAYLOAD_BYTES: Final = 1 << 34  # 16 GiB: full fine-tuning of a 4 G parameter model in float32
MAX_MANIFEST_BYTES: Final = 8 * 1024 * 1024  # MAX_TENSORS entries of two specs with long names
MAX_SIGNER_BYTES: Final = 256  # signer.pub: 64 hex digits and a line end

MAX_TENSORS: Final = 16_384  # entries of one ParamSpec
MAX_NAME_LENGTH: Final = 512  # characters of a tensor's name
MAX_RANK: Final = 8  # dimensions of a tensor
MAX_FACTOR_RANK: Final = 1 << 16  # of a low-rank factor
MAX_VALUES: Final = 1 << 36  # values of one ParamSpec; keeps byte counts far inside 64 bits

MAX_TEXT_LENGTH: Final = 512  # backbone, method, task and class names
MAX_CLIENT_LENGTH: Final = 128  # a client's name in headers, logs and reports
MAX_CODEC_LENGTH: Final = 64
MAX_NONCE_LENGTH: Final = 64  # hex digits: 32 bytes
MIN_NONCE_LENGTH: Final = 16  # hex digits: 8 bytes, so that an attempt cannot be guessed
MAX_METRICS: Final = 1_024  # of one update; a count for every element of a pool
MAX_REASON_LENGTH: Final = 1_000  # characters of a rejection's reason

MAX_ENROLMENT_BYTES: Final = 64 * 1024  # one message; honest ones are about 2 KiB
MAX_PEM_LENGTH: Final = 8 * 1024  # characters of a certificate, CSR or public key; P-384: about 900
MAX_FACTS: Final = 64  # versions or capabilities that a device tells
MAX_FACT_LENGTH: Final = 64  # characters of a name or a text among them
MAX_LABEL_LENGTH: Final = 40  # with what is added to it a common name, at most 64 characters
MAX_UNIX_TIME: Final = 253_402_300_799  # the end of the year 9999, as far as certificates go

MAX_ROUND: Final = (1 << 31) - 1
MAX_SAMPLES: Final = (1 << 31) - 1  # the weight that one client may claim
MAX_EPOCHS: Final = 1_000_000
MAX_LANES: Final = 8
MAX_STEPS: Final = 2**31 - 1
MAX_SEED: Final = (1 << 63) - 1

MAX_CLASSES: Final = 100_000
MAX_IMAGE_SIDE: Final = 8_192  # pixels
MAX_CHANNELS: Final = 64
MAX_TOKENS: Final = 1 << 20  # tokens of one sample
MAX_BATCH_SIZE: Final = 1 << 20
MAX_INPUTS: Final = 64  # named inputs of a model
MAX_FILES: Final = 1_024  # files of one bundle
MAX_FILE_BYTES: Final = 1 << 40
MAX_PATH_LENGTH: Final = 255
MAX_GRAPHS: Final = 64

"""The runtime: files and messages in, text out. `Engine` knows tokens and arrays; `Processor` text and pixels."""

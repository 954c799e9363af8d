"""The vocabulary: episode, policy, events, codec, errors. No torch, no I/O; everything else imports from here."""

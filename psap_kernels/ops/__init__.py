"""One module per op: its public function, fake kernel and choice of backend."""

package enum NBD {}

"""The loss op inside other people's trainers. Each module loads its library, none is loaded by
cpo_fast itself."""

"""The classes of ImageNet."""

from bitfleet.launch.data.imagenet import ILSVRC2012, synsets


def test_synsets_are_in_alphabetical_order() -> None:
    assert len(synsets()) == len(set(synsets())) == 1000
    assert list(synsets()) == sorted(synsets())
    assert (synsets()[0], synsets()[-1]) == ("n01440764", "n15075141")
    assert 1000 * ILSVRC2012.val_per_class == ILSVRC2012.val
